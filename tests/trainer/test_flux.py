"""The family flux is the stock FluxPipeline: same pictures, same predictions, same text; methods come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.errors import UserError
from trainer import artifact, delivery, families
from trainer.drawing import DrawSettings
from trainer.families import flux
from trainer.families.base import DENOISER, TEXT, VAE
from trainer.generate import Generator
from trainer.metrics import METRICS_FILE
from trainer.samples import Batch, Picture

FLUX = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
BOTH = pytest.mark.parametrize("tiny_model", ["flux", "schnell"], indirect=True)
T5_TOKENS = 48  # of the tiny tokenizer
PROMPT = "a photo of a dog"
SIZE = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(str(tiny_model), "cpu")


def stock(source: Path, kind: str = "", **parts: Any) -> Any:
    pipe = getattr(diffusers, f"Flux{kind}Pipeline").from_pretrained(source, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, seed: int, **changes: Any) -> Image.Image:
    """What the stock pipeline draws, as its documentation says."""
    guided = pipe.transformer.config.guidance_embeds
    own = {"guidance_scale": 4.0} if guided else {"true_cfg_scale": 4.0, "negative_prompt": ""}
    own |= {"num_inference_steps": 3, "max_sequence_length": T5_TOKENS, "prompt": PROMPT, **SIZE}
    return pipe(generator=torch.Generator().manual_seed(seed), **(own | changes)).images[0]


def drawn(generator: Generator, seed: int, prompt: str = PROMPT, **changes: Any) -> Image.Image:
    settings = {"prompt": prompt, "guidance_scale": 4.0, "num_inference_steps": 3, "token_scale": 1.0}
    return generator.draw_prompts([prompt], [seed], DrawSettings(**(settings | changes)))[0]


def equal(first: Image.Image, second: Image.Image) -> None:
    a, b = (np.asarray(picture, dtype=np.int16) for picture in (first, second))
    assert a.shape == b.shape and np.ptp(a) > 20 and np.abs(a - b).max() == 0


@BOTH
def test_a_prompt_is_drawn_as_the_stock_pipeline_does(generator, tiny_model):
    pipe = stock(tiny_model)
    equal(drawn(generator, 7), call(pipe, 7))
    equal(drawn(generator, 1, width=48, height=24), call(pipe, 1, width=48, height=24))


@BOTH
def test_a_negative_prompt_is_a_second_call_also_beside_built_in_guidance(generator, tiny_model):
    pipe, negative = stock(tiny_model), {"negative_prompt": "blurry"}
    if tiny_model.name == "schnell":
        equal(drawn(generator, 1, **negative), call(pipe, 1, **negative))
        with pytest.raises(UserError, match="true_cfg_scale is for"):
            drawn(generator, 1, true_cfg_scale=3.0)
        return
    equal(drawn(generator, 1, **negative), call(pipe, 1, true_cfg_scale=2.0, **negative))
    equal(drawn(generator, 1, true_cfg_scale=3.0, **negative), call(pipe, 1, true_cfg_scale=3.0, **negative))
    # asked for without one: away from no prompt at all
    equal(drawn(generator, 1, true_cfg_scale=3.0), call(pipe, 1, true_cfg_scale=3.0, negative_prompt=""))
    assert (np.asarray(drawn(generator, 1)) != np.asarray(drawn(generator, 1, true_cfg_scale=3.0))).any()
    with pytest.raises(UserError, match="negative_prompt has no effect"):
        drawn(generator, 1, true_cfg_scale=1.0, **negative)


@BOTH
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_a_picture_to_start_from_is_the_stock_pipelines(kind, generator, tiny_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    start, mask = Image.fromarray(pixels), Image.fromarray(np.tri(32, dtype=np.uint8) * 255)
    start.save(tmp_path / "start.png")
    mask.save(tmp_path / "mask.png")
    masked = {"mask_image": mask} if kind == "Inpaint" else {}
    expected = call(stock(tiny_model, kind), 3, image=start, strength=0.7, **masked)
    if masked:
        expected = Image.composite(expected, start, mask)
    given = {"image": tmp_path / "start.png"} | ({"mask": tmp_path / "mask.png"} if masked else {})
    equal(drawn(generator, 3, prompt_strength=0.7, **given), expected)


@pytest.mark.parametrize("tiny_model", ["sd", "xl", "flux"], indirect=True)
def test_half_precision_draws_too(tiny_model):
    source = str(tiny_model)
    family = families.family_class(source).load(source, frozenset({DENOISER, TEXT, VAE}), torch.bfloat16)
    with torch.no_grad():
        text = family.pipeline_inputs(family.encode_text([PROMPT]), family.null_conditioning())
        guidance = family.guidance_inputs(2.0, "")
        (picture,) = family.pipeline()(**text, **guidance, **SIZE, num_inference_steps=2).images
    assert np.ptp(np.asarray(picture, np.int16)) > 20


@FLUX
def test_the_scheduler_of_another_kind_of_model_is_refused(generator):
    with pytest.raises(UserError, match=r"ddim .* euler"):
        drawn(generator, 1, scheduler="ddim")


@BOTH
def test_predict_is_the_call_that_the_stock_pipeline_makes(tiny_model, load_family, monkeypatch):
    family, pipe, seen = load_family(tiny_model), stock(tiny_model), []
    real = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **given: seen.append(given) or real(**given))
    call(pipe, 5, guidance_scale=1.0, true_cfg_scale=1.0, num_inference_steps=2, height=24)
    text = family.encode_text([PROMPT])
    for given in seen:
        noisy = diffusers.FluxPipeline._unpack_latents(given["hidden_states"], 12, 16, 1)
        assert noisy.shape == (1, 4, 12, 16)
        found = family.predict(noisy, given["timestep"], text)
        expected = diffusers.FluxPipeline._unpack_latents(real(**given)[0], 12, 16, 1)
        assert torch.equal(found, expected)


@BOTH
def test_the_loss_is_that_of_flow_matching(tiny_model, load_family):
    family = load_family(tiny_model)
    shift = np.exp(1.15) if tiny_model.name == "flux" else 1.0
    data, noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    uniform, mask = torch.tensor([0.2, 0.9]), torch.ones(2, 1, 16, 16)
    mask[:, :, :8] = 0
    batch = Batch(data, noise, uniform, [PROMPT] * 2, mask, {}, [])
    text = family.encode_text(batch.captions)
    t = (shift * uniform / (1 + (shift - 1) * uniform)).view(2, 1, 1, 1).float()
    predicted = family.predict((1 - t) * data + t * noise, t.flatten(), text)
    expected = ((predicted - (noise - data)) ** 2)[:, :, 8:].mean()
    torch.testing.assert_close(family.training_loss(batch, text, 5.0), expected)


@FLUX
def test_latents_are_shifted_and_scaled(tiny_model, load_family):
    family = load_family(tiny_model)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    samples = family.encode([Picture(p, None, (32, 48), (0, 0)) for p in pixels], ["a", "b"])
    with torch.no_grad():
        posterior = family.module("vae").encode(pixels).latent_dist
    for i, sample in enumerate(samples):
        torch.testing.assert_close(sample.mean, (posterior.mean[i] - 0.12) * 0.36)
        torch.testing.assert_close(sample.std, posterior.std[i] * 0.36)


@BOTH
def test_text_is_as_long_as_the_model_was_trained_with(tiny_model, tmp_path):
    pipe = stock(tiny_model)
    pipe.tokenizer_2.model_max_length = 1000
    pipe.save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    family = families.family_class(source).load(source, frozenset({DENOISER, TEXT, VAE}), torch.float32)
    assert family.encode_text(["it"])["context"].shape[1] == (512 if tiny_model.name == "flux" else 256)


@BOTH
def test_text_is_read_in_training_as_in_drawing(tiny_model, load_family):
    """T5's configuration leaves out one number in ten in the training mode, which checkpointing needs."""
    family = load_family(tiny_model)
    assert family.module("text_encoder_2").config.dropout_rate > 0
    drawn = family.encode_text(["a robot"])
    for tower in family.text:
        tower.encoder.train()
    trained = family.encode_text(["a robot"])
    assert all(torch.equal(drawn[name], trained[name]) for name in drawn)


@BOTH
def test_geometry_and_recommendations_are_the_models_own(tiny_model):
    family = families.family_class(str(tiny_model))
    assert (family.geometry(str(tiny_model)).stride, family.geometry(str(tiny_model)).resolution) == (4, 32)
    draw = families.recommended(str(tiny_model), "draw")
    assert draw["guidance_scale"] == (3.5 if tiny_model.name == "flux" else 1.0)


def test_a_published_checkpoint_is_known_by_its_layers(tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    artifact.save_tensors(path, {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)})
    assert families.pipeline_name(str(path)) == "FluxPipeline"
    assert families.family_class(str(path)).geometry(str(path)).resolution == 1024


@BOTH
def test_a_published_checkpoint_takes_its_other_parts_from_the_hub(tiny_model, tmp_path, monkeypatch):
    guided, asked = tiny_model.name == "flux", []
    keys = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}
    keys |= {"guidance_in.in_layer.weight": torch.zeros(1)} if guided else {}
    artifact.save_tensors(tmp_path / "flux1.safetensors", keys)
    monkeypatch.setattr(flux, "DEV" if guided else "SCHNELL", str(tiny_model))
    whole = stock(tiny_model).transformer

    def from_single_file(path: str, **given: Any) -> Any:
        asked.append((path, given["config"], given["subfolder"]))
        return whole

    monkeypatch.setattr(flux.FluxTransformer2DModel, "from_single_file", from_single_file)
    source = str(tmp_path / "flux1.safetensors")
    family = families.family_class(source).load(source, frozenset({DENOISER, TEXT, VAE}), torch.float32)
    assert asked == [(source, str(tiny_model), "transformer")]
    assert family.module("transformer") is whole and len(family.text) == 2 and family.guided == guided


@FLUX
@pytest.mark.parametrize("variant", ["pivotal", "pivotal dora", "lora text", "full", "full text"])
def test_a_method_leaves_the_family_as_it_was(variant, lab, create):
    before, prediction = lab.snapshot(), lab.predict(PROMPT)
    method = create(variant)
    lab.train(method)
    assert not torch.equal(lab.predict(method.words([lab.caption])[0]), lab.predict(PROMPT))
    method.detach(lab.family)
    lab.assert_unchanged(before)
    assert torch.equal(lab.predict(PROMPT), prediction)


@FLUX
def test_tokens_go_into_clip_and_t5(lab, create):
    before = [tower.encoder.get_input_embeddings().weight.detach().clone() for tower in lab.family.text]
    assert [tower.embedding_key for tower in lab.family.text] == ["clip_l", "t5"]
    method = create("inversion")
    start = [p.detach().clone() for p in method.attach(lab.family)[0].parameters]
    method.detach(lab.family)
    rows = lab.train(create("inversion"))
    assert [tuple(row.shape) for row in rows] == [(2, 32), (2, 24)]
    assert all((row - first).abs().amax(dim=1).min() > 1e-3 for row, first in zip(rows, start, strict=True))
    for tower, weight in zip(lab.family.text, before, strict=True):
        known = len(tower.tokenizer) - 2  # the published T5 has room for more tokens than its tokenizer knows
        layer = tower.encoder.get_input_embeddings()
        assert torch.equal(layer.weight[:known], weight[:known])


@FLUX
def test_presets_of_layers_grow(lab, create):
    names = []
    for preset in ("attention", "attention_conv", "all"):
        method = create("lora", lora_targets=preset)
        method.attach(lab.family)
        names.append({key.split(".lora_")[0] for key in lora_keys(lab)})
        method.detach(lab.family)
    assert names[0] < names[1] < names[2]
    assert (len(names[0]), len(names[1]), len(names[2])) == (2 * 8 + 2 * 3, 2 * 12 + 2 * 5 + 1, 2 * 14 + 2 * 6 + 3)


def lora_keys(lab: Any) -> list[str]:
    return [name for name, _ in lab.family.module("transformer").named_parameters() if ".lora_A." in name]


@pytest.fixture
def saved(lab, create, dataset, tmp_path) -> Any:
    """Trains a variant a little; gives its folder of weights and the method, still attached."""

    def run(variant: str, **changes: Any) -> tuple[Path, Any]:
        method = create(variant, **changes)
        lab.train(method)
        folder = tmp_path / "weights"
        folder.mkdir()
        method.settings.output_dir.mkdir(exist_ok=True)
        (method.settings.output_dir / METRICS_FILE).touch()
        delivery.save_weights(folder, lab.family, method, dataset, delivery.Run(method.settings, 3))
        return folder, method

    return run


@FLUX
@pytest.mark.parametrize("variant", ["pivotal", "lora text", "full"])
def test_loaded_weights_are_the_trained_ones(variant, lab, saved, tiny_model):
    folder, method = saved(variant)
    generator = Generator(str(tiny_model), "cpu")
    base = drawn(generator, 4, "TOK on a hill")
    generator.use(folder)
    words = method.words(["TOK on a hill"])[0]
    assert torch.equal(lab.predict(words, generator.family), lab.predict(words))
    adapted = drawn(generator, 4, "TOK on a hill")
    equal(adapted, call(lab.family.pipeline(), 4, prompt=words))
    assert (np.asarray(adapted) != np.asarray(base)).any()
    generator.release()
    equal(drawn(generator, 4, "TOK on a hill"), base)


@FLUX
def test_stock_diffusers_draws_the_same_from_our_files(lab, saved, tiny_model):
    folder, method = saved("pivotal")
    pipe = stock(tiny_model)
    pipe.load_lora_weights(folder, weight_name=artifact.ADAPTER)
    rows, _ = artifact.load_tensors(folder / artifact.EMBEDDINGS)
    names = list(method.tokens())
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("t5", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(list(rows[key]), token=names, text_encoder=encoder, tokenizer=tokenizer)
    for module in pipe.text_encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = pipe.tokenizer.eos_token_id
    words = method.words(["TOK on a hill"])[0]
    found, ours = (np.asarray(call(p, 4, prompt=words), np.int16) for p in (pipe, lab.family.pipeline()))
    assert np.abs(found - ours).max() <= 1


@FLUX
def test_a_base_in_8_bits_trains_nearly_the_same_adapter(lab, create):
    method = create("lora", lora_targets="attention")
    parameters = [p for group in method.attach(lab.family) for p in group.parameters]
    for seed, parameter in enumerate(parameters):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    net = lab.family.module("transformer")
    lab.family.enable_gradient_checkpointing()
    net.train()
    expected = torch.autograd.grad(lab.predict(PROMPT).square().mean(), parameters)
    before = lab.predict(PROMPT)
    lab.family.store_in_fp8()
    held = {name: p.dtype for name, p in net.named_parameters()}
    assert held["transformer_blocks.0.norm1.linear.weight"] == torch.float8_e4m3fn
    assert held["transformer_blocks.0.attn.to_q.base_layer.weight"] == torch.float8_e4m3fn
    assert held["x_embedder.weight"] == held["proj_out.weight"] == torch.float32
    assert {p.dtype for p in parameters} == {torch.float32}
    found = torch.autograd.grad(lab.predict(PROMPT).square().mean(), parameters)
    one, other = (torch.cat([g.flatten() for g in grads]) for grads in (expected, found))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99 and not torch.equal(one, other)
    assert (lab.predict(PROMPT) - before).norm() < 0.1 * before.norm()
    assert held["transformer_blocks.0.attn.to_q.base_layer.weight"] == torch.float8_e4m3fn


@pytest.mark.parametrize("wrong", [{"method": "full", "gradient_checkpointing": True}, {"method": "lora"}])
def test_8_bits_are_for_frozen_weights_and_checkpointing(wrong, settings):
    with pytest.raises(ValueError, match="base_precision fp8"):
        settings(base_precision="fp8", **wrong)
