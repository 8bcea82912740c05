"""A prefix in tiny CLIP, T5 and Qwen2.5-VL text encoders: out come the text's states, as behind real tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    Qwen2_5_VLTextConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from preprocessing.errors import UserError
from tests.trainer.tiny import tiny_text_config, tiny_tokenizer
from trainer.families.base import TextTower
from trainer.families.pipeline_family import drop_nothing, find_end_by_id
from trainer.methods.soft_prefix import SoftPrefix, initial_rows

LENGTH, COUNT, WIDTH = 20, 3, 32
TEXTS = ["a dog", "a longer text"]


class Letters:
    """A tokenizer without a begin token, as T5's (ends with one) and Qwen's (does not); pads on the right."""

    bos_token_id, eos_token_id, pad_token_id, model_max_length = None, 1, 0, 512

    def __init__(self, ends: bool):
        self.ends = ends

    def __len__(self) -> int:
        return 128

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [ord(letter) for letter in text] + ([1] if self.ends and add_special_tokens else [])
        return type("Encoded", (), {"input_ids": ids})()


@dataclass
class Bench:
    """A text encoder with the ids and the mask of TEXTS."""

    tower: TextTower
    ids: Tensor  # [2, LENGTH]
    mask: Tensor | None

    def states(self, rows: slice = slice(None), **options: Any) -> Tensor:
        mask = None if self.mask is None else self.mask[rows]
        return self.tower.encoder(self.ids[rows], attention_mask=mask, **options).last_hidden_state


def clip_bench(projected: bool = False) -> Bench:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = LENGTH
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    tower = TextTower(tokenizer, kind(tiny_text_config(tokenizer, max_position_embeddings=LENGTH)), "clip", "clip_l")
    find_end_by_id(tower)
    ids = tokenizer(TEXTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    return Bench(tower, ids, None)


def letters_bench(tokenizer: Letters, encoder: nn.Module) -> Bench:
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        found = tokenizer(text).input_ids
        ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
    return Bench(TextTower(tokenizer, encoder, "text", "text"), ids, mask)


def t5_bench() -> Bench:
    config = T5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    return letters_bench(Letters(ends=True), T5EncoderModel(config))


def qwen_bench() -> Bench:
    config = Qwen2_5_VLTextConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    )
    return letters_bench(Letters(ends=False), Qwen2_5_VLTextModel(config))


BENCHES: dict[str, Callable[[], Bench]] = {
    "clip": clip_bench,
    "clip with projection": lambda: clip_bench(projected=True),
    "t5": t5_bench,
    "qwen": qwen_bench,
}


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest) -> Bench:
    torch.manual_seed(0)
    made = BENCHES[request.param]()
    made.tower.encoder.requires_grad_(False).eval()
    drop_nothing(made.tower)
    return made


@pytest.fixture
def prefix(bench: Bench) -> SoftPrefix:
    return SoftPrefix(bench.tower, torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(1)))


def words(bench: Bench) -> Tensor:
    """Ids of real tokens, as many as the prefix has vectors."""
    return torch.tensor([ord(letter) for letter in "xyz"]) % len(bench.tower.tokenizer)


def test_a_prefix_of_real_tokens_is_the_text_with_these_tokens_in_it(bench):
    tower, begin = bench.tower, bench.tower.begin
    chosen = words(bench).expand(2, -1)
    room = LENGTH - COUNT if tower.positions == LENGTH else LENGTH
    joined = torch.cat([bench.ids[:, :begin], chosen, bench.ids[:, begin:room]], dim=1)
    mask = None if bench.mask is None else torch.cat([torch.ones_like(chosen), bench.mask], dim=1)
    by_hand = tower.encoder(joined, attention_mask=mask, output_hidden_states=True)
    SoftPrefix(tower, tower.encoder.get_input_embeddings().weight[chosen[0]].clone())
    found = tower.encoder(bench.ids, attention_mask=bench.mask, output_hidden_states=True)
    ours = [found.last_hidden_state, *found.hidden_states]
    theirs = [by_hand.last_hidden_state, *by_hand.hidden_states]
    for one, other in zip(ours, theirs, strict=True):
        sliced = torch.cat([other[:, :begin], other[:, begin + COUNT :]], dim=1)
        torch.testing.assert_close(one[:, :room], sliced)
        assert one.shape == (2, LENGTH, WIDTH)
        assert torch.equal(one[:, room:], one[:, room - 1 : room].expand(-1, LENGTH - room, -1))
    for pooled in ("pooler_output", "text_embeds"):
        if pooled in by_hand:
            torch.testing.assert_close(found[pooled], by_hand[pooled])


def test_gradients_reach_the_prefix_alone(bench, prefix):
    bench.states().square().mean().backward()
    assert prefix.rows.grad.abs().min() > 0
    others = [p for p in bench.tower.encoder.parameters() if p is not prefix.rows]
    assert not any(p.requires_grad or p.grad is not None for p in others)


def test_checkpointing_changes_nothing(bench, prefix):
    expected = torch.autograd.grad(bench.states().square().mean(), prefix.rows)[0]
    bench.tower.encoder.activation_checkpointing_enable()
    bench.tower.encoder.train()
    found = torch.autograd.grad(bench.states().square().mean(), prefix.rows)[0]
    torch.testing.assert_close(found, expected)


def test_without_gradients_it_is_the_same(bench, prefix):
    """Of a causal encoder the prefix's keys and values are then kept."""
    whole = bench.states().detach()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(bench.states(), whole)
        assert (prefix._keys is not None) == isinstance(bench.tower.encoder, Qwen2_5_VLTextModel)
        prefix.rows.neg_()  # and made anew where it has moved
        changed = bench.states()
    assert not torch.allclose(changed, whole, atol=1e-3)
    torch.testing.assert_close(changed, bench.states().detach())


def test_one_text_depends_neither_on_its_neighbours_nor_on_its_padding(bench, prefix):
    both = bench.states()
    for row in (0, 1):
        torch.testing.assert_close(bench.states(slice(row, row + 1))[0], both[row])
    if bench.mask is not None:
        long = int(bench.mask.sum(dim=1).max())
        short = Bench(bench.tower, bench.ids[:, :long], bench.mask[:, :long]).states()
        valid = bench.mask[:, :long].bool()
        torch.testing.assert_close(short[valid], both[:, :long][valid])


def test_at_strength_zero_and_when_it_is_gone_the_encoder_is_its_own(bench):
    tower = bench.tower
    tree, plain = [name for name, _ in tower.encoder.named_modules()], bench.states()
    prefix = SoftPrefix(tower, torch.randn(COUNT, WIDTH))
    whole = bench.states()
    assert not torch.allclose(whole, plain, atol=1e-3)
    with prefix.weighing(0.0):
        assert torch.equal(bench.states(), plain)
    with prefix.weighing(0.25):
        half = tower.encoder(bench.ids, attention_mask=bench.mask, output_hidden_states=True)
    torch.testing.assert_close(half.last_hidden_state, plain + 0.25 * (whole - plain))
    prefix.remove()
    assert torch.equal(bench.states(), plain) and "forward" not in vars(tower.encoder)
    assert [name for name, _ in tower.encoder.named_modules()] == tree


def test_numbers_are_left_out_while_it_trains_only(bench):
    prefix = SoftPrefix(bench.tower, torch.ones(COUNT, WIDTH), dropout=0.5)
    assert torch.equal(prefix.vectors(), prefix.rows)
    prefix.vectors.train()
    torch.manual_seed(0)
    found = prefix.vectors()
    assert set(found.unique().tolist()) == {0.0, 2.0} and 0.25 < (found == 0).float().mean() < 0.75


def test_the_vectors_are_fp32_in_an_encoder_of_half_precision(bench):
    bench.tower.encoder.bfloat16()
    prefix = SoftPrefix(bench.tower, torch.randn(COUNT, WIDTH))
    assert bench.states().dtype == torch.bfloat16 == bench.tower.encoder.dtype
    assert prefix.rows.dtype == torch.float32


def test_it_starts_as_words_of_the_vocabulary(bench):
    vocabulary = bench.tower.encoder.get_input_embeddings().weight
    told = initial_rows(bench.tower, 5, "ab", seed=0)
    ids = bench.tower.tokenizer("ab", add_special_tokens=False).input_ids
    assert torch.equal(told, vocabulary[(ids * 3)[:5]])
    chosen, again, other = (initial_rows(bench.tower, 5, "", seed) for seed in (0, 0, 1))
    assert all((vocabulary == row).all(dim=1).any() for row in chosen)
    assert torch.equal(chosen, again) and not torch.equal(chosen, other)


def test_a_long_text_ends_with_its_end_where_there_is_no_room_for_all():
    torch.manual_seed(0)
    bench = clip_bench()
    tokenizer: PreTrainedTokenizerBase = bench.tower.tokenizer
    ids = tokenizer(["a" * 40, "b" * 17], truncation=True, max_length=LENGTH, padding="max_length").input_ids
    prefix = SoftPrefix(bench.tower, torch.randn(COUNT, WIDTH))
    kept = prefix._shortened(torch.tensor(ids))
    assert kept.shape == (2, LENGTH - COUNT) and (kept[:, -1] == tokenizer.eos_token_id).all()
    assert kept[:, :-1].tolist() == [row[: LENGTH - COUNT - 1] for row in ids]
    with pytest.raises(UserError, match="prefix_init_text"):
        initial_rows(bench.tower, 5, " ", seed=0)
    with pytest.raises(UserError, match="num_prefix_tokens 18 leaves no place"):
        SoftPrefix(clip_bench().tower, torch.randn(LENGTH - 2, WIDTH))
