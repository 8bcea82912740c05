"""OmniGen2: the published names, the paper's sequence written out plainly, the model's own time, guidance, drawing."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from preprocessing.errors import UserError
from tests.trainer.omnigen2_models import tiny_mllm, tiny_qwen_tokenizer, tiny_transformer
from trainer import families
from trainer.drawing import DrawSettings
from trainer.families.base import INPAINT
from trainer.families.omnigen2.family import OmniGen2, chat
from trainer.families.omnigen2.pipeline import Guidance, sampling_sigmas
from trainer.families.omnigen2.transformer import OmniGen2Transformer2DModel, References, patches_of, picture_of
from trainer.generate import Generator
from trainer.objectives import Flow
from trainer.samples import Batch, Picture, padded

# Qwen2.5's own, as its tokenizer renders a chat; the part for tools is left out
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
)
ATTENTION = [f"attn.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")]
BLOCK = [*ATTENTION, *(f"feed_forward.linear_{i}.weight" for i in (1, 2, 3))]
BLOCK += ["ffn_norm1.weight", "norm2.weight", "ffn_norm2.weight"]
MODULATED = [*BLOCK, "norm1.linear.weight", "norm1.linear.bias", "norm1.norm.weight"]
AROUND = ["x_embedder.weight", "x_embedder.bias", "ref_image_patch_embedder.weight", "ref_image_patch_embedder.bias"]
AROUND += [f"time_caption_embed.timestep_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
AROUND += [f"time_caption_embed.caption_embedder.{name}" for name in ("0.weight", "1.weight", "1.bias")]
AROUND += [f"norm_out.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def transformer() -> OmniGen2Transformer2DModel:
    return tiny_transformer()


@pytest.fixture(scope="module")
def family(tiny_omnigen2, load_family) -> OmniGen2:
    return load_family(tiny_omnigen2)


def test_at_the_published_size_it_has_the_published_tensors():
    with torch.device("meta"):
        model = OmniGen2Transformer2DModel(
            hidden_size=2520,
            num_layers=32,
            num_attention_heads=21,
            num_kv_heads=7,
            axes_dim_rope=(40, 40, 40),
            axes_lens=(10000, 10000, 10000),
            text_feat_dim=2048,
            timestep_scale=1000.0,
        )
    stacks = [(f"{name}.{i}", MODULATED) for name in ("noise_refiner", "ref_image_refiner") for i in range(2)]
    stacks += [(f"layers.{i}", MODULATED) for i in range(32)]
    stacks += [(f"context_refiner.{i}", [*BLOCK, "norm1.weight"]) for i in range(2)]
    wanted = {"image_index_embedding", *AROUND} | {f"{name}.{key}" for name, keys in stacks for key in keys}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes.keys() == wanted and len(wanted) == 582
    assert shapes["layers.0.norm1.linear.weight"] == (10080, 1024)
    assert shapes["layers.0.feed_forward.linear_1.weight"] == (10240, 2520)
    assert shapes["layers.0.attn.to_k.weight"] == (840, 2520) and shapes["image_index_embedding"] == (5, 2520)
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e9, 3) == 3.967


def rotations(positions: list[tuple[int, int, int]], sizes: tuple[int, ...]) -> Tensor:
    """[1, N, head / 2] of the paper's formula: axis a turns by position / 10000^(2 i / size)."""
    rows = [
        [position[axis] / 10000 ** (2 * i / size) for axis, size in enumerate(sizes) for i in range(size // 2)]
        for position in positions
    ]
    angles = torch.tensor(rows, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None]


def grid(first: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    return [(first, row, column) for row in range(rows) for column in range(columns)]


def plain_forward(model: OmniGen2Transformer2DModel, latents: Tensor, time: float, text: Tensor, shown: list) -> Tensor:
    """One sample without any padding: latents [C, H, W], valid text [L, D], references [C, h, w] each."""
    sizes, length = model.config.axes_dim_rope, len(text)
    stamp = torch.tensor([time * model.config.timestep_scale])
    moment, states = model.time_caption_embed(text[None], stamp, text[None])
    places = [(i, i, i) for i in range(length)]
    for block in model.context_refiner:
        states = block(states, None, rotations(places, sizes))
    parts, first = [states], length
    for index, one in enumerate(shown):
        rows, columns = one.shape[1] // 2, one.shape[2] // 2
        own = grid(first, rows, columns)
        states = model.ref_image_patch_embedder(patches_of(one, 2))[None] + model.image_index_embedding[index]
        for block in model.ref_image_refiner:
            states = block(states, None, rotations(own, sizes), moment)
        parts.append(states)
        places, first = places + own, first + max(rows, columns)
    rows, columns = latents.shape[1] // 2, latents.shape[2] // 2
    own = grid(first, rows, columns)
    states = model.x_embedder(patches_of(latents, 2))[None]
    for block in model.noise_refiner:
        states = block(states, None, rotations(own, sizes), moment)
    joint = torch.cat([*parts, states], dim=1)
    for block in model.layers:
        joint = block(joint, None, rotations(places + own, sizes), moment)
    return picture_of(model.norm_out(joint, moment)[:, -rows * columns :], (rows, columns), 2)[0]


def ragged() -> tuple[Tensor, Tensor, list[Tensor], list[list[Tensor]]]:
    """Latents and times of three samples, with texts and references of several lengths and sizes."""
    source = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    shown = [[random(4, 4, 12), random(4, 6, 6)], [], [random(4, 8, 4)]]
    return random(3, 4, 6, 8), torch.tensor([0.1, 0.55, 0.9]), [random(length, 32) for length in (3, 7, 5)], shown


def together(texts: list[Tensor], shown: list[list[Tensor]]) -> tuple[Tensor, Tensor, References]:
    """One batch: text, its mask, references."""
    mask = torch.stack(padded([torch.ones(len(text), dtype=torch.long) for text in texts]))
    empty = torch.zeros(0, 0, 16)
    patches = [torch.stack(padded([patches_of(one, 2) for one in row])) if row else empty for row in shown]
    sizes = [torch.tensor([[one.shape[1] // 2, one.shape[2] // 2] for one in row]).reshape(-1, 2) for row in shown]
    return torch.stack(padded(texts)), mask, References(torch.stack(padded(patches)), torch.stack(padded(sizes)).long())


def test_a_ragged_batch_is_each_sample_alone_written_out_plainly(transformer):
    latents, times, texts, shown = ragged()
    text, mask, references = together(texts, shown)
    with torch.no_grad():
        found = transformer(latents, times, text, mask, references)
        for i in range(3):
            alone = plain_forward(transformer, latents[i], times[i].item(), texts[i], shown[i])
            torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
        # what it would be if the references were not seen, or in another order
        without = transformer(latents, times, text, mask, None)
        swapped = transformer(latents[:1], times[:1], *together(texts[:1], [shown[0][::-1]]))
    assert torch.allclose(found[1], without[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], without[0], atol=1e-3) and not torch.allclose(found[0], swapped[0], atol=1e-3)


def test_gradients_are_numbers_and_the_same_with_checkpointing(transformer):
    latents, times, texts, shown = ragged()
    text, mask, references = together(texts, shown)
    text.requires_grad_(True)
    gradients = []
    for checkpointed in (False, True):
        model = tiny_transformer()
        if checkpointed:
            model.enable_gradient_checkpointing()
        loss = model(latents, times, text, mask, references).square().mean()
        gradients.append(torch.autograd.grad(loss, [text, *model.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)
    assert gradients[0][0][0, 3:].eq(0).all() and gradients[0][0][0, :3].abs().sum() > 0  # nothing of the padding


def test_patches_hold_their_pixels_row_by_row_with_the_channels_innermost():
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patches_of(latents, 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 4].tolist() == [
        latents[0, channel, row, column].item() for row in (2, 3) for column in (2, 3) for channel in (0, 1)
    ]
    assert torch.equal(picture_of(patches, (2, 3), 2), latents)


def test_the_text_is_the_whole_models_last_states_of_the_chat(family, tiny_omnigen2):
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = QWEN_TEMPLATE
    system = "You are a helpful assistant that generates high-quality images based on user instructions."
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "a dog"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == chat("a dog")
    whole = tiny_mllm(tokenizer)
    whole.model.language_model.load_state_dict(family.module("mllm").state_dict())
    whole.eval()
    ids = tokenizer(chat("a dog"), return_tensors="pt").input_ids
    expected = whole(ids, output_hidden_states=True).hidden_states[-1]
    found = family.encode_text(["a dog", "a dog that is asleep"])
    assert found["mask"].sum(dim=1).tolist() == [ids.shape[1], found["mask"].shape[1]]
    torch.testing.assert_close(found["context"][:1, : ids.shape[1]], expected)


def test_no_prompt_is_trained_with_another_system_prompt_than_drawing_leads_away_from(family):
    null, away = family.null_conditioning(), family.negative_conditioning()
    assert null["context"].shape[1] < away["context"].shape[1]
    assert torch.equal(away["context"], family.encode_text([""])["context"])


def test_the_models_time_runs_the_other_way(family):
    data, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = family.encode_text(["it"])
    uniform = torch.tensor([0.3])
    batch = Batch(data, noise, uniform, ["it"], None, {}, [])
    own = 1 - family.times(uniform, data)  # 0 is noise
    noisy = own * data + (1 - own) * noise
    velocity = family.module("transformer")(noisy, own, text["context"], text["mask"])
    expected = (velocity - (data - noise)).square().mean()
    torch.testing.assert_close(family.training_loss(batch, text, None), expected)


@pytest.mark.parametrize(("side", "mu"), [(32, 0.5), (128, 1.15), (80, 0.5 + 0.65 * (1600 - 256) / (4096 - 256))])
def test_training_times_are_logit_normal_and_shifted_with_the_size(family, side, mu):
    uniform = torch.linspace(0.005, 0.995, 199)
    found = family.times(uniform, torch.zeros(1, 4, side, side))
    even = torch.logit(found.double()) - mu  # exp(mu) s / (1 + (exp(mu) - 1) s) adds mu to the logit
    torch.testing.assert_close(even, torch.special.ndtri(uniform.double()), rtol=1e-4, atol=1e-4)
    assert all(a < b for a, b in pairwise(found.tolist()))


def test_the_other_flows_times_are_even_as_before():
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Flow(3.0).times(uniform), 3.0 * uniform / (1 + 2.0 * uniform))


def test_drawing_steps_are_the_models_shifted_times():
    steps, height, width = 7, 96, 64
    shift = math.sqrt(height * width) / 40
    times = [i / steps for i in range(steps)]
    own = [t / (shift - shift * t + t) for t in times]
    assert sampling_sigmas(steps, height, width).tolist() == pytest.approx([1 - t for t in own])


class Told:
    """A family whose velocity says what it was asked by."""

    def __init__(self) -> None:
        self.asked: list[set[str]] = []

    def predict(self, latents: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        self.asked.append(set(conditioning))
        value = {"text": 100.0, "negative": 1.0}[next(iter(set(conditioning) - {"shown"}))]
        return torch.full((1,), value + (10.0 if "shown" in conditioning else 0.0))


@pytest.mark.parametrize(
    ("shown", "scales", "expected"),
    [
        (True, (5.0, 2.0), 1 + 2 * 10 + 5 * (110 - 11)),
        (True, (5.0, 1.0), 1 + 5 * (110 - 1)),  # as the published pipeline at its own default
        (True, (1.0, 2.0), 110),
        (False, (5.0, 2.0), 1 + 5 * 99),
        (False, (1.0, 2.0), 100),
    ],
)
def test_guidance_is_by_text_and_by_references(shown, scales, expected):
    one, told = torch.zeros(1), Told()
    led = Guidance({"text": one}, {"negative": one}, {"shown": one} if shown else {}, *scales)
    assert led.velocity(told, torch.zeros(1, 1), torch.tensor(0.5)).item() == expected
    assert len(told.asked) == {1: 1, 5: 3 if shown and scales[1] > 1 else 2}[int(scales[0])]


def test_a_picture_is_the_euler_solution_decoded(family):
    text = {name: value.detach() for name, value in family.encode_text(["a dog"]).items()}
    pipe = family.pipeline()
    options = {"width": 32, "height": 24, "num_inference_steps": 3, "image_guidance_scale": 1.0}
    found = pipe(
        text, family.negative_conditioning(), [torch.Generator().manual_seed(2)], guidance_scale=1.0, **options
    )
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(2))
    sigmas = [*sampling_sigmas(3, 12, 16).tolist(), 0.0]
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            latents = latents + (following - sigma) * family.predict(latents, torch.tensor([sigma]), text)
        pixels = family.module("vae").decode(latents / 0.36 + 0.12).sample
    expected = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(expected - np.asarray(found.images[0], dtype=np.float32)).max() <= 1


def test_pictures_bring_their_references_and_dropping_leaves_them_out(family):
    source = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 32, 32, generator=source) * 2 - 1
    shown = (torch.rand(3, 16, 24, generator=source) * 2 - 1, torch.rand(3, 32, 32, generator=source) * 2 - 1)
    pictures = [Picture(pixels, None, (32, 32), (0, 0), conditions=one) for one in (shown, ())]
    first, second = family.encode(pictures, ["a", "b"])
    assert first.conditioning["reference_sizes"].tolist() == [[4, 6], [8, 8]]
    assert first.conditioning["reference_patches"].shape == (2, 64, 16)
    assert torch.equal(
        first.conditioning["reference_patches"][0, :24], patches_of(family.encode_pixels(shown[0][None]), 2)[0]
    )
    nothing = family.null_picture()
    assert all(torch.equal(value, nothing[name]) for name, value in second.conditioning.items())
    many = Picture(pixels, None, (32, 32), (0, 0), conditions=(pixels,) * 6)
    with pytest.raises(UserError, match="6 reference pictures"):
        family.encode([many], ["c"])


def test_an_edit_has_the_size_of_its_picture_and_depends_on_it(tiny_omnigen2, tmp_path):
    for name, colour in (("red", (220, 10, 10)), ("blue", (10, 10, 220))):
        Image.new("RGB", (30, 41), colour).save(tmp_path / f"{name}.png")
    generator = Generator(str(tiny_omnigen2), "cpu")

    def drawn(*names: str, **options: float) -> Image.Image:
        shown = tuple(tmp_path / f"{name}.png" for name in names)
        (picture,) = generator.draw(DrawSettings(prompt="more", seed=0, references=shown, **options))
        return picture

    red, blue, both = drawn("red"), drawn("blue"), drawn("red", "blue")
    assert red.size == (24, 36) and both.size == (32, 32)  # at most 32 squared, in steps of 4
    assert red.tobytes() != blue.tobytes() != both.tobytes()
    assert drawn("red", width=32, height=20).size == (32, 20)
    assert drawn("red", image_guidance_scale=4.0).tobytes() != red.tobytes() == drawn("red").tobytes()


def test_what_it_has_not_is_refused(tiny_omnigen2, tiny_sd, settings, tmp_path):
    source = str(tiny_omnigen2)
    for changes in ({"method": "pivotal"}, {"method": "lora", "train_text_encoder": True}):
        with pytest.raises(UserError, match="OmniGen2"):
            OmniGen2.check(settings(base_model=source, **changes))
    with pytest.raises(UserError, match="references"):
        families.load(source, frozenset(), torch.float32).pipeline(INPAINT)
    with pytest.raises(UserError, match="references are nothing"):
        Generator(str(tiny_sd), "cpu").draw(DrawSettings(prompt="a", references=(tmp_path / "x.png",)))
