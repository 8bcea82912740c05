"""New tokens: where they start, what they replace, and that no other row of the vocabulary ever moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from preprocessing.errors import UserError
from trainer.families.base import Family
from trainer.methods.adapters import ADAPTER
from trainer.methods.textual_inversion import TOKENS
from trainer.methods.tokens import NewTokens


@pytest.mark.parametrize("variant", ["pivotal", "inversion"])
def test_the_vocabulary_stays_bit_identical_while_the_new_rows_move(variant, lab, create):
    before = [tower.encoder.get_input_embeddings().weight.clone() for tower in lab.family.text]
    method = create(variant, n_tokens=3)
    (group,) = (group for group in method.attach(lab.family) if group.name == TOKENS)
    start = [p.detach().clone() for p in group.parameters]
    method.detach(lab.family)
    method = create(variant, n_tokens=3)
    lab.train(method)
    for tower, rows in zip(lab.family.text, before, strict=True):
        layer = tower.encoder.get_input_embeddings()
        effective = layer.get_merged_weights([ADAPTER])
        assert torch.equal(effective[: len(rows)], rows) and torch.equal(layer.weight[: len(rows)], rows)
        ids = tower.tokenizer.convert_tokens_to_ids(list(method.tokens()))
        moved = effective[ids] - start[lab.family.text.index(tower)]
        assert (moved.abs().amax(dim=1) > 1e-3).all()  # every row, and not only the first


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of TOK", "a photo of <s0><s1>"),
        ("TOK's hat, TOK.", "<s0><s1>'s hat, <s0><s1>."),
        ("stoking STOKE TOKEN aTOK TOK2 TOK_", "stoking STOKE TOKEN aTOK TOK2 TOK_"),
        ("tok Tok", "tok Tok"),
        ("(TOK)-TOK/TOK", "(<s0><s1>)-<s0><s1>/<s0><s1>"),
        ("", ""),
    ],
)
def test_the_trigger_is_replaced_at_word_boundaries(caption, expected, create):
    for variant in ("pivotal", "inversion"):
        assert create(variant).words([caption, "x"]) == [expected, "x"]
    assert create("lora").words([caption]) == [caption]


@pytest.mark.parametrize("trigger", ["C++", "<me>", r"a\1", "日本"])
def test_any_word_can_be_the_trigger(trigger, create):
    assert create("pivotal", trigger_word=trigger).words([f"a {trigger}, b"]) == ["a <s0><s1>, b"]


def token_rows(family: Family, class_word: str, seed: int = 0, count: int = 4) -> list[Tensor]:
    tokens = NewTokens({"TOK": [f"<s{i}>" for i in range(count)]})
    tokens.attach(family, {"TOK": class_word}, seed)
    rows = [p.detach().clone() for p in tokens.parameters]
    tokens.detach(family)
    return rows


def test_tokens_start_as_wide_as_the_vocabulary(lab):
    vocabularies = [tower.encoder.get_input_embeddings().weight.clone() for tower in lab.family.text]
    for rows, vocabulary in zip(token_rows(lab.family, ""), vocabularies, strict=True):
        assert rows.shape == (4, vocabulary.shape[1])
        expected = vocabulary.std(dim=1).mean()
        torch.testing.assert_close(rows.std(dim=1), expected.expand(4))
        assert (torch.pdist(rows) > expected).all()
    assert all(torch.equal(a, b) for a, b in zip(token_rows(lab.family, ""), token_rows(lab.family, ""), strict=True))
    assert not torch.equal(token_rows(lab.family, "", 1)[0], token_rows(lab.family, "", 2)[0])


def test_tokens_start_near_the_class_word(lab):
    for tower, rows in zip(lab.family.text, token_rows(lab.family, "big dog"), strict=True):
        vocabulary = tower.encoder.get_input_embeddings().weight.detach()
        centre = vocabulary[tower.tokenizer("big dog", add_special_tokens=False).input_ids].mean(dim=0)
        spread = vocabulary.std(dim=1).mean()
        assert ((rows - centre).std(dim=1) < 0.2 * spread).all()
        assert (torch.pdist(rows) > 0).all()  # equal rows would stay equal


@pytest.mark.parametrize("count", [1, 3])
def test_the_spread_penalty_pulls_to_the_vocabularys(count, lab, create):
    method = create("inversion", n_tokens=count, token_std_penalty=0.5)
    (group,) = method.attach(lab.family)
    assert method.penalty().item() == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        for rows in group.parameters:
            rows *= 3
    penalty = method.penalty()
    assert penalty.item() == pytest.approx(0.5 * (3 - 1) ** 2, rel=1e-4)
    penalty.backward()
    assert all(torch.isfinite(rows.grad).all() and (rows.grad != 0).any() for rows in group.parameters)
    method.detach(lab.family)
    method = create("inversion", n_tokens=count, token_std_penalty=0.0)
    method.attach(lab.family)
    assert method.penalty() == 0.0


@pytest.mark.parametrize("tower", [0, -1])
def test_a_vocabulary_that_has_the_tokens_already_is_refused(tower, lab, create):
    lab.family.text[tower].tokenizer.add_tokens(["<s1>"])
    before = lab.snapshot()
    method = create("pivotal")
    with pytest.raises(UserError, match="<s1>"):
        method.attach(lab.family)
    method.detach(lab.family)
    lab.assert_unchanged(before)


def test_a_padded_embedding_keeps_its_size(lab, create):
    for tower in lab.family.text:
        tower.encoder.resize_token_embeddings(len(tower.tokenizer) + 64, mean_resizing=False)
    before = lab.snapshot()
    method = create("pivotal")
    lab.train(method)
    for tower, count in zip(lab.family.text, before["vocabulary"], strict=True):
        assert len(tower.encoder.get_input_embeddings().weight) == count
    method.detach(lab.family)
    lab.assert_unchanged(before)


def test_schedule_of_the_tokens_falls_and_ends_at_the_pivot(create):
    inversion, pivotal = create("inversion"), create("pivotal", pivot_fraction=0.7)
    assert inversion.schedule(0.25)[TOKENS] == pytest.approx(0.75**1.7)
    assert inversion.schedule(0.9)[TOKENS] > 0
    assert pivotal.schedule(0.69)[TOKENS] == pytest.approx(0.31**1.7)
    assert pivotal.schedule(0.7)[TOKENS] == pivotal.schedule(0.99)[TOKENS] == 0
    assert create("pivotal", pivot_fraction=0.0).schedule(0.0)[TOKENS] == 0
