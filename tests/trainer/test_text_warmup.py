"""Tokens that are fitted to the class word before the run, by the text encoders alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from preprocessing.errors import UserError
from tests.trainer.bench import Bench, set_up
from trainer import text_warmup
from trainer.methods.regularisers import meaning_distance
from trainer.methods.textual_inversion import TOKENS

CAPTIONS = [f"a photo of TOK number {i}" for i in range(4)]


@pytest.fixture
def bench(lab, tiny_model, settings, dataset) -> Callable[..., Bench]:
    """A method with few tokens around a class word, attached."""
    common = {"class_word": "dog", "token_text_warmup": 40}
    return lambda **changes: set_up(lab.family, settings(base_model=str(tiny_model), **common | changes), dataset)


def rows_of(setup: Bench) -> list[torch.Tensor]:
    (group,) = (group for group in setup.groups if group.name == TOKENS)
    return [p.detach().clone() for p in group.parameters]


def fit(setup: Bench, captions: list[str] = CAPTIONS) -> tuple[float, float]:
    return text_warmup.fit(setup.family, setup.method, setup.groups, setup.cached, captions)


@torch.no_grad()
def read(setup: Bench) -> dict[str, torch.Tensor]:
    return setup.family.encode_text(setup.method.words(CAPTIONS))


def test_captions_with_the_trigger_come_to_mean_what_they_do_with_the_class_word(bench):
    setup = bench(method="textual_inversion")
    before, after = fit(setup)
    assert 0 < after < 0.4 * before
    with torch.no_grad():
        wanted = setup.family.encode_text([caption.replace("TOK", "dog") for caption in CAPTIONS])
    assert meaning_distance(read(setup), wanted).mean().item() == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("tiny_model", ["sd", pytest.param("xl", marks=pytest.mark.slow)], indirect=True)
def test_it_depends_on_the_seed_alone_and_brings_seeds_together(bench):
    rows, texts = {}, {}
    for key in ((0, 1), (0, 2), (1, 1)):
        setup = bench(method="textual_inversion", seed=key[0])
        torch.manual_seed(key[1])
        state = torch.get_rng_state()
        fresh = read(setup)
        fit(setup)
        texts[key] = fresh, read(setup)
        assert torch.equal(torch.get_rng_state(), state)
        rows[key] = rows_of(setup)
        setup.method.detach(setup.family)
    assert all(torch.equal(a, b) for a, b in zip(rows[0, 1], rows[0, 2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows[0, 1], rows[1, 1], strict=True))
    before, after = (meaning_distance(a, b).mean() for a, b in zip(texts[0, 1], texts[1, 1], strict=True))
    assert after < 0.2 * before


def test_it_moves_the_new_rows_and_nothing_else(bench, lab):
    setup = bench(method="pivotal", token_text_warmup=2)
    before, rows = lab.snapshot(), rows_of(setup)
    fit(setup)
    assert all(not torch.equal(a, b) for a, b in zip(rows, rows_of(setup), strict=True))
    after = lab.snapshot()
    moved = {name for name, value in before["tensors"].items() if not torch.equal(value, after["tensors"][name])}
    assert len(moved) == len(rows) and all("trainable_tokens_delta" in name for name in moved)
    assert after["gradients"] == before["gradients"] and after["trainable"] == before["trainable"]


def test_without_a_caption_that_has_the_trigger_there_is_nothing_to_fit(bench):
    with pytest.raises(UserError, match="token_text_warmup"):
        fit(bench(), ["a quiet lake"])


def test_the_distance_is_of_the_mean_over_what_is_read():
    states, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    shorter = torch.cat([states[:, :3].flip(1), torch.full((2, 3, 8), 7.0)], dim=1)
    same = meaning_distance({"context": shorter[:1], "mask": mask[:1]}, {"context": states[:1], "mask": mask[:1]})
    torch.testing.assert_close(same, torch.zeros(1), rtol=0, atol=1e-9)
    twice = meaning_distance({"pooled": 3 * states[:, 0]}, {"pooled": states[:, 0]})
    torch.testing.assert_close(twice, torch.full((2,), 4.0))
