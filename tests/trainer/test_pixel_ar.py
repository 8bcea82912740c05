"""The autoregressive model's properties: causal, normalised, exact in closed cases, the same drawn as read."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.families.pixel_ar.model import PixelAR, bits_per_dim
from trainer.families.pixel_ar.pipeline import PixelARPipeline, open_pipeline
from trainer.families.pixel_ar.prior import dct_bank
from trainer.families.pixel_ar.sampling import Sampling, draw, guided, pick
from trainer.families.pixel_ar.text import NO_TOKEN, pretrained_tokenizer, token_ids, vocabulary_tokenizer
from trainer.families.pixel_ar.trunk import Cached

SMALL = {
    **{"hidden_dim": 16, "num_layers": 4, "levels": 16, "image_size": 8},
    **{"text_embed_dim": 16, "num_text_layers": 1, "text_nhead": 2, "max_text_length": 8},
}
SWITCHES = {
    "prior": {},
    "no prior": {"use_frequency_prior": False},
    "text": {"vocab_size": 12},
    "classes": {"num_classes": 3, "use_frequency_prior": False},
    "all": {"vocab_size": 12, "num_classes": 3},
}
CAPTIONS = ["a photo of a cat", "a red car", "a photo of an apple, red"]


def model(**changes: Any) -> PixelAR:
    """A small one in which nothing is zero, as nothing is after training."""
    torch.manual_seed(0)
    made = PixelAR(**(SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs(made: PixelAR, count: int, side: tuple[int, int] = (5, 6)) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Random values, and what the model reads beside them."""
    config, source = made.config, torch.Generator().manual_seed(3)
    values = torch.randint(0, config.levels, (count, config.channels, *side), generator=source)
    ids = torch.randint(0, 12, (count, 4), generator=source) if config.vocab_size else None
    return values, ids, torch.arange(count) % 3 if config.num_classes else None


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_a_value_depends_on_all_before_it_and_on_none_after(switches: dict, training: bool) -> None:
    made = model(**switches).train(training)
    (values, ids, label), side = inputs(made, 1), (5, 6)

    def logits(one: Tensor) -> Tensor:
        torch.manual_seed(1)  # of the text encoder's dropout
        return made(one, ids, label)

    order = list(itertools.product(range(side[0]), range(side[1]), range(3)))  # rows, columns, then R, G, B
    with torch.no_grad():
        before = logits(values)
        for place, (i, j, channel) in enumerate(order):
            changed = values.clone()
            changed[0, channel, i, j] = (changed[0, channel, i, j] + 5) % 16
            moved = (logits(changed) != before)[0].any(dim=-1).permute(1, 2, 0).flatten()
            assert not moved[: place + 1].any(), (i, j, channel)
            # no blind spot: whatever comes later sees it, the last value of all too
            assert moved[place + 1 :].all(), (i, j, channel)


def test_gradients_reach_only_what_came_before() -> None:
    made = model()
    values = inputs(made, 1)[0].permute(0, 2, 3, 1)
    scaled = made.trunk.scaled(values).requires_grad_()
    made.trunk.scaled = lambda _: scaled
    made.trunk(values, made.condition(None, None))[0, 2, 3].sum().backward()
    reached = scaled.grad[0].abs().sum(dim=-1) > 0
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[:2], expected[2, :3] = True, True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_probabilities_of_all_tiny_pictures_sum_to_one(switches: dict) -> None:
    made = model(levels=4, channels=1, **switches)
    every = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 1, 2, 2)
    _, ids, label = inputs(made, 1)
    rows = [None if one is None else one.expand(256, *one.shape[1:]) for one in (ids, label)]
    with torch.no_grad():
        nats = made.nats(every, *rows).flatten(1).double().sum(dim=1)
    assert math.isclose(torch.exp(-nats).sum().item(), 1, abs_tol=1e-5)
    assert torch.exp(-nats).std() > 0  # and they are not all the same


def test_uniform_logits_are_eight_bits_and_perfect_ones_none() -> None:
    made = model(levels=256)
    with torch.no_grad():
        for layer in made.head.logits:
            layer.weight.zero_()
            layer.bias.zero_()
        values = torch.randint(0, 256, (2, 3, 4, 4))
        assert bits_per_dim(made.nats(values)).sub(8).abs().max() < 1e-6
        for layer, value in zip(made.head.logits, (7, 0, 255), strict=True):
            layer.bias[value] = 1e4
        exact = torch.tensor([7, 0, 255]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
        assert bits_per_dim(made.nats(exact)).abs().max() == 0
        # the values of one channel are not taken for another's, nor one pixel's for its neighbour's
        other = exact.clone()
        other[0, 1, 2, 3] = 9
        assert ((made.nats(other) > 0).nonzero().tolist()) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_cached_rows_give_the_logits_of_the_whole_picture(switches: dict) -> None:
    made = model(**switches, num_layers=7)
    values, ids, label = inputs(made, 2, (9, 7))
    with torch.no_grad():
        whole = made(values, ids, label)
        last = values.permute(0, 2, 3, 1)
        for i, row in enumerate(Cached(made.trunk, made.condition(ids, label), (2, 9, 7)).rows(last)):
            for j in range(7):
                hidden = made.head.norm(row.pixel(j, last[:, i, j - 1] if j else None))
                for channel in range(3):
                    found = made.head.channel(hidden, [last[:, i, j, k] for k in range(channel)])
                    torch.testing.assert_close(found, whole[:, channel, i, j], rtol=1e-4, atol=1e-5)


def test_half_precision_draws_what_it_reads_too(tmp_path) -> None:
    words(num_classes=2).save_pretrained(tmp_path)
    pipe = open_pipeline(tmp_path, torch.bfloat16)
    made, whole = pipe.model, open_pipeline(tmp_path, torch.float32).model
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    values, ids = inputs(made, 2)[0], pipe.encode(CAPTIONS[:2])["ids"]
    label, last = torch.tensor([0, 2]), values.permute(0, 2, 3, 1)
    with torch.no_grad():
        rounded, exact = made(values, ids, label).float(), whole(values, ids, label)
        assert (rounded - exact).abs().mean() < 0.1 * exact.std()
        for i, row in enumerate(Cached(made.trunk, made.condition(ids, label), (2, 5, 6)).rows(last)):
            for j in range(6):
                hidden = made.head.norm(row.pixel(j, last[:, i, j - 1] if j else None))
                found = made.head.channel(hidden, []).float()
                assert (found - rounded[:, 0, i, j]).abs().mean() < 0.1 * exact.std()


def naive(made: PixelAR, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Pictures by a whole forward pass a value, as the definition says."""
    batch, height, width, channels = uniform.shape
    values = torch.zeros(batch, channels, height, width, dtype=torch.long)
    with torch.no_grad():
        for i, j, channel in itertools.product(range(height), range(width), range(channels)):
            values[:, channel, i, j] = pick(made(values)[:, channel, i, j], uniform[:, i, j, channel], sampling)
    return values.to(torch.uint8)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(0.7, 0.8)])
def test_drawing_is_the_naive_loop(sampling: Sampling) -> None:
    made = model()
    uniform = torch.rand(2, 5, 6, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draw(made, made.condition(None, None), uniform, sampling), naive(made, uniform, sampling))


def test_values_are_picked_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    uniform = torch.arange(4000) / 4000

    def shares(sampling: Sampling) -> list[float]:
        return (torch.bincount(pick(logits, uniform, sampling), minlength=4) / 4000).tolist()

    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    squared = [0.25, 0.09, 0.0225, 0.0025]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([one / sum(squared) for one in squared], abs=1e-3)
    edge = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert pick(edge, torch.zeros(1), Sampling()).item() == 1  # never a value of probability 0


def test_guidance_goes_from_the_untold_to_the_told() -> None:
    told, untold = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    both = torch.cat([told, untold])
    assert torch.equal(guided(told, 1.0), told)
    for scale, expected in ((0.0, untold), (2.0, 2 * told.log_softmax(-1) - untold.log_softmax(-1))):
        torch.testing.assert_close(guided(both, scale).softmax(-1), expected.softmax(-1))


def words(captions: list[str] = CAPTIONS, **changes: Any) -> PixelARPipeline:
    tokenizer = vocabulary_tokenizer(captions, 50)
    pipe = PixelARPipeline(model(vocab_size=len(tokenizer), **changes), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe: PixelARPipeline, prompts: list[str], seeds: list[int], **changes: Any) -> list[bytes]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [one.tobytes() for one in pipe(prompts, generator=generators, size=(4, 4), **changes).images]


def test_a_picture_depends_on_its_own_prompt_and_seed_alone() -> None:
    pipe = words()
    together = pixels(pipe, CAPTIONS, [0, 1, 0])
    assert together == [pixels(pipe, [prompt], [seed])[0] for prompt, seed in zip(CAPTIONS, [0, 1, 0], strict=True)]
    assert len({*together, *pixels(pipe, CAPTIONS[:1], [5])}) == 4
    scaled = Sampling(guidance_scale=3.0)
    assert pixels(pipe, CAPTIONS[:2], [1, 2], sampling=scaled)[1:] == pixels(pipe, CAPTIONS[1:2], [2], sampling=scaled)


def test_class_zero_is_a_class_and_no_class_another_thing() -> None:
    made = model(num_classes=3)
    values = inputs(made, 1)[0].expand(4, -1, -1, -1)
    with torch.no_grad():
        logits = made(values, None, torch.tensor([0, 1, 2, 3]))
    assert all((logits[a] - logits[b]).abs().max() > 1e-3 for a, b in itertools.combinations(range(4), 2))
    pipe = PixelARPipeline(made, None)
    labels = [pipe.class_labels(one, 2)["class_label"].tolist() for one in (0, None)]
    assert labels == [[0, 0], [3, 3]]
    for wrong in (3, 7):
        with pytest.raises(Exception, match="give 0 to 2"):
            pipe.class_labels(wrong, 1)
    with pytest.raises(Exception, match="without classes"):
        PixelARPipeline(model(), None).class_labels(0, 1)


def test_names_of_classes_have_ids_and_logits_of_their_own() -> None:
    names = [f"a photo of a {name}" for name in ("cat", "dog", "aquarium fish", "maple tree")]
    pipe = words(names)
    ids = pipe.encode(names)["ids"]
    unknown = pipe.tokenizer.unk_token_id
    assert len({tuple(row) for row in ids.tolist()}) == 4 and not (ids == unknown).any()
    with torch.no_grad():
        logits = pipe.model(inputs(model(), 1)[0].expand(4, -1, -1, -1), ids)
    assert all((logits[a] - logits[b]).abs().max() > 1e-4 for a, b in itertools.combinations(range(4), 2))
    assert (pipe.encode(["a zebra"])["ids"] == unknown).sum() == 1


def test_padding_changes_nothing() -> None:
    pipe = words()
    values = inputs(pipe.model, 3)[0]
    ids = pipe.encode(CAPTIONS)["ids"]
    lengths = (ids != NO_TOKEN).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        together = pipe.model(values, ids)
        for row, length in enumerate(lengths):
            alone = pipe.model(values[row : row + 1], ids[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_each_position_looks_at_the_words_in_its_own_way() -> None:
    made = model(vocab_size=12)
    _, ids, _ = inputs(made, 1)
    condition, fusion = made.condition(ids, None), made.trunk.layers[0].fusion
    x = torch.randn(1, 2, 2, 16)
    with torch.no_grad():
        added = fusion(x, fusion.words(condition.words), condition.mask) - x
        query, (key, _) = fusion.query(fusion.norm(x)), fusion.words(condition.words)
        seen = torch.softmax(query.view(4, 16) @ key[0].permute(1, 0, 2).reshape(-1, 16).T, dim=-1)
    assert added.view(4, 16).std(dim=0).max() > 1e-3
    assert seen.std(dim=0).max() > 1e-4


def test_tokenizers_of_transformers_give_their_vocabulary(tmp_path) -> None:
    from tests.trainer.conftest import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = pretrained_tokenizer(str(tmp_path))
    ids = token_ids(tokenizer, ["a cat", ""], 8)
    assert ids.shape == (2, 8) and ids.dtype == torch.int32 and ids.max() < len(tokenizer)
    assert (ids[1] != NO_TOKEN).any()  # there is something to look at
    with pytest.raises(Exception, match="could not be loaded"):
        pretrained_tokenizer(str(tmp_path / "none"))


def test_vocabulary_is_the_same_in_any_order_and_keeps_the_frequent(tmp_path) -> None:
    one, other = vocabulary_tokenizer(CAPTIONS, 50), vocabulary_tokenizer(CAPTIONS[::-1], 50)
    assert one.get_vocab() == other.get_vocab()
    assert {"<pad>", "<unk>", "<eos>", "<bos>"} < one.get_vocab().keys()
    few = vocabulary_tokenizer(CAPTIONS, 6).get_vocab()
    assert len(few) == 6 and "a" in few  # the most frequent word
    one.save_pretrained(tmp_path)
    again = pretrained_tokenizer(str(tmp_path))
    assert again(CAPTIONS[0]).input_ids == one(CAPTIONS[0]).input_ids
    assert one("A CAT").input_ids == one("a cat").input_ids


def test_the_frequency_bank_is_orthonormal_and_its_first_wave_constant() -> None:
    bank = dct_bank(8, 64).flatten(1)
    torch.testing.assert_close(bank @ bank.T, torch.eye(64), atol=1e-5, rtol=0)
    assert bank[0].std() < 1e-7


def test_a_saved_pipeline_is_the_same_model(tmp_path) -> None:
    pipe = words(num_classes=2)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))
    again = PixelARPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert pixels(again, CAPTIONS[:1], [4], class_label=1) == pixels(pipe, CAPTIONS[:1], [4], class_label=1)
