"""Prompt alignment: the push by its formula, nothing where base and adapted agree, and no change without the switch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from tests.trainer.bench import set_up
from trainer import alignment
from trainer.alignment import OWN_GUIDANCE, TARGET_GUIDANCE, PromptAlignment
from trainer.config import JobSettings
from trainer.objectives import Flow

PROMPT = "{trigger} on a hill"
SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


@pytest.fixture
def settings(job_settings, tiny_model):
    def made(**changes) -> JobSettings:
        own = {"base_model": str(tiny_model), "class_word": "dog", "alignment_prompt": PROMPT, "alignment_weight": 0.1}
        return JobSettings.model_validate(job_settings.model_dump() | own | changes)

    return made


def test_the_prompts_are_the_subjects_and_the_class_words(tmp_path):
    given = {"input_images": tmp_path, "trigger_word": "SKS", "class_word": "dog"}
    assert alignment.prompts(JobSettings(**given)) == []
    asked = JobSettings(**given, alignment_prompt=PROMPT, alignment_weight=1.0)
    assert alignment.prompts(asked) == ["SKS on a hill", "dog on a hill"]


def test_the_gradient_is_the_push(tmp_path):
    """A net that predicts its one number times the text's, with which everything can be written out."""
    weight = torch.tensor(0.5, requires_grad=True)
    base, seen = torch.tensor(0.3), []

    class Stub:
        objective = Flow()
        current = weight

        def times(self, uniform, data):
            return uniform

        def predict(self, noisy, t, conditioning):
            seen.append((noisy, t))
            return self.current * conditioning["text"].view(-1, 1, 1, 1).expand_as(noisy)

    family = Stub()

    class Off:
        def __enter__(self):
            family.current = base

        def __exit__(self, *_):
            family.current = weight

    own = {"TOK on a hill": 2.0, "": 0.25}
    settings = JobSettings(
        input_images=tmp_path, class_word="dog", alignment_prompt=PROMPT, alignment_weight=1.0
    )  # of which only the prompt is read here
    text = {name: {"text": torch.tensor([[value]])} for name, value in {"dog on a hill": 4.0, "": 0.5}.items()}
    term = PromptAlignment(family, SimpleNamespace(disabled=lambda _: Off()), text, settings)
    batch = SimpleNamespace(data=torch.randn(4, 1, 2, 2), conditioning={}, keys=tuple("abcd"))
    loss = term(batch, lambda captions: {"text": torch.tensor([[own[one]] for one in captions])})
    found = 0.5 * (0.25 + OWN_GUIDANCE * (2.0 - 0.25))
    target = 0.3 * (0.5 + TARGET_GUIDANCE * (4.0 - 0.5))
    assert loss.item() == pytest.approx(0.5 * (target - found) ** 2, rel=1e-4)
    loss.backward()
    # the estimate is x - t * 2 w, so that its derivative is -2 t
    times = seen[0][1]
    assert len(times) == 2 and weight.grad.item() == pytest.approx(
        ((target - found) * -2.0 * times).mean().item(), rel=1e-4
    )


@SD_ONLY
def test_where_both_see_the_same_there_is_no_push(settings, lab, dataset, monkeypatch):
    monkeypatch.setattr(alignment, "TARGET_GUIDANCE", OWN_GUIDANCE)
    bench = set_up(lab.family, settings(method="lora", trigger_word="dog", class_word="dog"), dataset)
    parameters = [p for group in bench.groups for p in group.parameters]
    loss = bench.module._alignment(bench.batch(), bench.module.conditioning)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert loss.item() == pytest.approx(0.0, abs=1e-8)
    assert all(one is None or one.abs().max() < 1e-5 for one in gradients)


@pytest.mark.parametrize("tiny_model", ["sd", "xl", "flux"], indirect=True)
def test_every_step_has_it_and_the_same_twice(settings, lab, dataset):
    bench = set_up(lab.family, settings(), dataset)
    torch.manual_seed(1)
    first = bench.module(bench.batch())
    torch.manual_seed(2)
    again = bench.module(bench.batch())
    plain = bench.module._family.training_loss(
        bench.batch(), bench.batch().conditioning | bench.module.conditioning(bench.batch().captions), 5.0
    )
    assert torch.equal(first, again) and first > plain + bench.method.penalty()


def test_it_wants_a_prompt_with_the_trigger_and_a_base_beside(tmp_path):
    for wrong in (
        {"alignment_weight": 1.0},
        {"alignment_prompt": PROMPT},
        {"alignment_weight": 1.0, "alignment_prompt": "a hill"},
        {"alignment_weight": 1.0, "alignment_prompt": PROMPT, "method": "full"},
    ):
        with pytest.raises(ValidationError, match="alignment_prompt"):
            JobSettings(input_images=tmp_path, **wrong)
