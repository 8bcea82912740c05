"""What Kandinsky 2.2 draws and leaves: the stock pipelines' pictures, from our archives and from diffusers' layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoPipelineForText2Image, KandinskyV22Img2ImgCombinedPipeline, UNet2DConditionModel
from PIL import Image

import predict
from preprocessing.errors import UserError
from trainer import artifact, families, job, join, publish
from trainer.artifact import LORA_FILE
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator

FULL = {"checkpoint_every": 1, "ema_decay": 0.5}
JOBS = {
    "prior": {"method": "lora", "lora_targets": "attention"},
    "decoder": {"method": "lora", "use_dora": True, "lora_rank": 2, "lora_alpha": 1.0},
}
PROMPT = "A robot naruto, 4k photo"
CALL = {"num_inference_steps": 3, "prior_num_inference_steps": 3}
SIZE = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def generator(tiny_decoder: Path) -> Generator:
    return Generator(str(tiny_decoder), "cpu")


@pytest.fixture(scope="module")
def stock(tiny_decoder: Path) -> Any:
    return quiet(AutoPipelineForText2Image.from_pretrained(tiny_decoder))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(generator: Generator, **changes: Any) -> np.ndarray:
    settings = DrawSettings(**({"prompt": PROMPT} | CALL | changes))
    return np.asarray(generator.draw_prompts([PROMPT], [7], settings)[0])


def stock_drawn(pipe: Any, **changes: Any) -> np.ndarray:
    return np.asarray(pipe(PROMPT, generator=seeded(7), **(CALL | SIZE | changes)).images[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": "ugly"},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
        {"prior_guidance_scale": 7.0, "prior_num_inference_steps": 5, "width": 48},
    ],
)
def test_the_stock_combined_pipeline_draws_the_same(changes, generator, stock) -> None:
    found = drawn(generator, **changes)
    assert np.ptp(found) > 20
    # with a negative prompt the rows of a matrix product stand elsewhere, which may round otherwise
    difference = np.abs(found.astype(int) - stock_drawn(stock, **changes))
    assert difference.max() <= ("negative_prompt" in changes)


def test_a_prior_as_the_base_draws_the_same(generator, tiny_prior, tiny_decoder) -> None:
    other = Generator(str(tiny_prior), "cpu", companion=str(tiny_decoder))
    assert (drawn(other) == drawn(generator)).all()
    assert other.geometry == generator.geometry


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++"])
def test_schedulers_that_fit_draw(name, generator, stock, monkeypatch) -> None:
    found = drawn(generator, scheduler=name)
    if name == "ddpm":
        assert (found == stock_drawn(stock)).all()
    else:
        assert np.isfinite(found).all() and (found != drawn(generator)).any()


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "unipc"])
def test_schedulers_that_the_pipelines_cannot_use_are_refused(name, generator) -> None:
    with pytest.raises(UserError, match="ddim"):
        drawn(generator, scheduler=name)


def test_image_to_image_is_the_stock_pipelines(generator, stock, tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    pipe = quiet(KandinskyV22Img2ImgCombinedPipeline(**stock.components))
    changes = {"num_inference_steps": 6, "strength": 0.5, "image": Image.fromarray(pixels)}
    found = drawn(generator, image=tmp_path / "start.png", prompt_strength=0.5, num_inference_steps=6)
    assert (found == stock_drawn(pipe, **changes)).all()
    with pytest.raises(UserError, match="inpainting"):
        drawn(generator, image=tmp_path / "start.png", mask=tmp_path / "start.png")


@pytest.mark.parametrize("changes", [{}, {"negative_prompt": "ugly"}, {"guidance_scale": 1.0}])
def test_a_picture_is_its_own_seeds_whatever_is_drawn_beside_it(changes, generator) -> None:
    """Several at once without guidance is also what the stock pipeline crashes on."""
    settings = DrawSettings(**({"prompt": PROMPT} | CALL | changes))
    prompts, seeds = [PROMPT, "a cat", PROMPT], [5, 6, 7]
    together = generator.draw_prompts(prompts, seeds, settings)
    for prompt, seed, picture in zip(prompts, seeds, together, strict=True):
        (alone,) = generator.draw_prompts([prompt], [seed], settings)
        assert np.abs(np.asarray(alone, np.int16) - np.asarray(picture, np.int16)).max() <= 1


def test_settings_of_a_prior_are_refused_elsewhere(tiny_sd) -> None:
    with pytest.raises(UserError, match="prior_guidance_scale"):
        Generator(str(tiny_sd), "cpu").draw(DrawSettings(prompt="a", prior_guidance_scale=2.0))


@pytest.fixture(scope="module")
def trained(tiny_prior, tiny_decoder, tmp_path_factory) -> Callable[..., JobSettings]:
    """Runs a whole short job on one half, once for each settings, and gives these back."""
    pictures, done = tmp_path_factory.mktemp("pictures"), {}
    for i in range(2):
        Image.new("RGB", (48, 40), (90 * i, 200, 40)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"TOK number {i}", encoding="utf-8")

    def run(half: str, **changes: Any) -> JobSettings:
        models = {"prior": tiny_prior, "decoder": tiny_decoder}
        (other,) = models.keys() - {half}
        usual = {
            **{"input_images": pictures, "base_model": str(models[half]), "companion_model": str(models[other])},
            **{"method": "full", "snr_gamma": None, "resolution": 40, "mixed_precision": "no", "report_to": "none"},
            **{"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 0.02, "lr_schedule": "constant"},
            **{"lr_warmup_steps": 0, "preview_prompts": ["TOK"], "preview_seeds": [1], "holdout": 0},
            **{"validation_folds": 0, "save_diffusers": True},
        }
        key = json.dumps([half, changes], default=str, sort_keys=True)
        if key not in done:
            output = tmp_path_factory.mktemp("jobs")
            done[key] = JobSettings(**(usual | {"output_dir": output} | changes))
            job.train(done[key])
        return done[key]

    return run


def archive_of(settings: JobSettings) -> Path:
    return settings.output_dir / job.ARCHIVE


@pytest.fixture
def run_code(monkeypatch) -> Callable[[str], np.ndarray]:
    """Runs Python that draws, as the seed's README and our card have it, on a CPU; gives back the picture."""

    def run(code: str) -> np.ndarray:
        # offloading wants an accelerator, and fp16 is none of a CPU's
        monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda self: quiet(self))
        code = code.replace("torch.float16", "torch.float32")
        code = re.sub(r"pipe\(prompt=([^)]*)\)", r"pipe(prompt=\1, **call)", code)
        names = {"call": CALL | SIZE | {"generator": seeded(7)}}
        exec(re.sub(r"(\w+(?:\[0\])?|pipe\(.*\]?)\.save\(.*\)", r"picture = \1", code), names)
        return np.asarray(names["picture"])

    return run


# the seed's, with load_lora_adapter for load_attn_procs, which diffusers no longer reads LoRA with
LORA_SNIPPET = """
from diffusers import AutoPipelineForText2Image
import torch

pipe = AutoPipelineForText2Image.from_pretrained(decoder, torch_dtype=torch.float16)
pipe.{module}.load_lora_adapter(output_dir, weight_name="pytorch_lora_weights.safetensors", prefix="{net}")
pipe.enable_model_cpu_offload()

prompt='A robot naruto, 4k photo'
image = pipe(prompt=prompt).images[0]
image.save("robot_naruto.png")
"""
SNIPPETS = {
    ("decoder", "full"): """
from diffusers import AutoPipelineForText2Image
import torch

pipe = AutoPipelineForText2Image.from_pretrained(output_dir, torch_dtype=torch.float16)
pipe.enable_model_cpu_offload()

prompt='A robot naruto, 4k photo'
images = pipe(prompt=prompt).images
images[0].save("robot-naruto.png")
""",
    ("prior", "full"): """
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
import torch

pipe_prior = DiffusionPipeline.from_pretrained(output_dir, torch_dtype=torch.float16)
prior_components = {"prior_" + k: v for k,v in pipe_prior.components.items()}
pipe = AutoPipelineForText2Image.from_pretrained(decoder, **prior_components, torch_dtype=torch.float16)

pipe.enable_model_cpu_offload()
prompt='A robot naruto, 4k photo'
images = pipe(prompt=prompt).images
images[0].save("robot-naruto.png")
""",
    ("decoder", "lora"): LORA_SNIPPET.format(module="unet", net="unet"),
    ("prior", "lora"): LORA_SNIPPET.format(module="prior_prior", net="prior"),
}


@pytest.mark.parametrize(("half", "method"), SNIPPETS)
def test_the_seeds_snippets_draw_what_predict_draws(half, method, trained, run_code, generator, tiny_decoder) -> None:
    settings = trained(half, **(JOBS[half] if method == "lora" else FULL))
    expected = drawn_with(generator, archive_of(settings))
    assert (expected != drawn(generator)).any()
    names = f"output_dir, decoder = {str(settings.output_dir)!r}, {str(tiny_decoder)!r}\n"
    assert (run_code(names + SNIPPETS[half, method]) == expected).all()
    card = (settings.output_dir / artifact.CARD).read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert "a photo of TOK" in code
    assert (run_code(code.replace("a photo of TOK", PROMPT)) == expected).all()


def drawn_with(generator: Generator, *archives: Path, **changes: Any) -> np.ndarray:
    generator.use(*archives)
    try:
        return drawn(generator, **changes)
    finally:
        generator.release()


def test_a_checkpoints_unet_draws(trained, tiny_decoder, generator) -> None:
    """The seed's second snippet; the checkpoint of the last step is what was delivered."""
    settings = trained("decoder", **FULL)
    checkpoints = sorted((settings.output_dir / "checkpoints").glob("step_*"))
    unet = UNet2DConditionModel.from_pretrained(checkpoints[-1] / "unet")
    pipe = quiet(AutoPipelineForText2Image.from_pretrained(tiny_decoder, unet=unet))
    assert (stock_drawn(pipe) == drawn_with(generator, archive_of(settings))).all()
    assert len(checkpoints) == 2 and (checkpoints[0] / "unet" / "config.json").is_file()


def test_both_halves_draw_together(trained, generator, stock, tmp_path) -> None:
    prior, decoder = (trained(half, **JOBS[half]) for half in JOBS)
    stock.prior_prior.load_lora_adapter(prior.output_dir, weight_name=LORA_FILE, prefix="prior", adapter_name="p")
    stock.unet.load_lora_adapter(decoder.output_dir, weight_name=LORA_FILE, prefix="unet", adapter_name="u")
    expected = stock_drawn(stock)
    for net, name in ((stock.prior_prior, "p"), (stock.unet, "u")):
        net.delete_adapters(name)
    archives = archive_of(prior), archive_of(decoder)
    assert (drawn_with(generator, *archives) == expected).all()
    assert (drawn_with(generator, *reversed(archives)) == expected).all()
    # one file with the keys of both
    tensors, configs = {}, {}
    for settings in (prior, decoder):
        found, header = artifact.load_tensors(settings.output_dir / LORA_FILE)
        tensors |= found
        configs |= json.loads(header["lora_adapter_metadata"])
    header = {"lora_adapter_metadata": json.dumps(configs)}
    artifact.save_tensors(tmp_path / "both.safetensors", tensors, header)
    assert (drawn_with(generator, tmp_path / "both.safetensors") == expected).all()
    join.main(
        ["--weights", str(archives[1]), "--companion_weights", str(archives[0]), "--out", str(tmp_path / "one.tar")]
    )
    assert (drawn_with(generator, tmp_path / "one.tar") == expected).all()
    with pytest.raises(UserError, match="Both weights hold"):
        join.join(join.JoinSettings(weights=archives[0], companion_weights=tmp_path / "one.tar", out=tmp_path / "x"))
    assert (drawn_with(generator, *archives, lora_scale=0.0) == drawn(generator)).all()
    with pytest.raises(UserError, match="both hold weights of the unet"):
        generator.use(archives[1], tmp_path / "both.safetensors")
    # the door
    argv = ["--prompt", PROMPT, "--seed", "7", "--output_dir", str(tmp_path / "drawn")]
    argv += [word for name, value in CALL.items() for word in (f"--{name}", str(value))]
    predict.main(["--weights", str(archives[1]), "--companion_weights", str(archives[0]), *argv])
    assert (np.asarray(Image.open(tmp_path / "drawn" / "0001_seed7.png")) == expected).all()


def test_without_a_decoder_the_prior_is_delivered_without_pictures(trained, tmp_path, capsys) -> None:
    settings = trained("prior", method="lora", companion_model=str(tmp_path / "nowhere"))
    assert archive_of(settings).is_file() and not list((settings.output_dir / "samples").glob("*.png"))
    assert "No pictures were drawn" in capsys.readouterr().err
    assert "No pictures were drawn" in (settings.output_dir / "report.html").read_text(encoding="utf-8")


def test_previews_have_the_trained_size(trained) -> None:
    settings = trained("prior", **JOBS["prior"])
    with Image.open(settings.output_dir / "samples" / "00_adapted.png") as picture:
        assert picture.size == (40, 40)


OLD_NAMES = {"to_out.0": "to_out"}


@pytest.mark.parametrize(("half", "prefixed"), [("prior", False), ("decoder", True)])
def test_old_attention_processors_files_load_whole(half, prefixed, trained, generator, tmp_path) -> None:
    settings = trained(half, **JOBS["prior"])
    tensors, _ = artifact.load_tensors(settings.output_dir / LORA_FILE)
    old = {}
    for key, value in tensors.items():
        net, rest = key.split(".", 1)
        attention, projection, matrix = re.fullmatch(r"(.+)\.(\w*_\w+(?:\.0)?)\.lora_([AB])\.weight", rest).groups()
        name = f"{attention}.processor.{OLD_NAMES.get(projection, projection)}_lora.{'down' if matrix == 'A' else 'up'}"
        old[f"{net}.{name}.weight" if prefixed else f"{name}.weight"] = value
    assert len(old) == len(tensors) and (half == "prior" or any("add_k_proj_lora" in key for key in old))
    artifact.save_tensors(tmp_path / "old.safetensors", old)
    expected = drawn_with(generator, archive_of(settings))
    assert (expected != drawn(generator)).any()
    assert (drawn_with(generator, tmp_path / "old.safetensors") == expected).all()
    with pytest.raises(UserError, match="no place"):
        artifact.save_tensors(tmp_path / "odd.safetensors", old | {"mid.processor.to_q_lora.up.weight": torch.ones(2)})
        generator.use(tmp_path / "odd.safetensors")


@pytest.mark.slow
def test_a_prior_learns_new_words(trained, generator) -> None:
    settings = trained("prior", method="pivotal", class_word="dog")
    generator.use(archive_of(settings))
    try:
        changed = [
            np.asarray(generator.draw(DrawSettings(prompt="TOK", seed=1, token_scale=s, **CALL))[0]) for s in (0, 1)
        ]
    finally:
        generator.release()
    assert (changed[0] != changed[1]).any()


def test_half_a_base_is_told(tiny_decoder, tiny_prior, tmp_path) -> None:
    with pytest.raises(UserError, match="companion_model"):
        Generator(str(tiny_prior), "cpu", companion=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is a kandinsky22_prior"):
        Generator(str(tiny_prior), "cpu", companion=str(tiny_prior))
    broken = shutil.copytree(tiny_decoder, tmp_path / "broken")
    shutil.rmtree(broken / "movq")
    with pytest.raises(UserError, match="movq"):
        Generator(str(broken), "cpu")
    with pytest.raises(families.NoCompanion, match="movq"):  # a prior can do without
        Generator(str(tiny_prior), "cpu", companion=str(broken))


@pytest.mark.parametrize(("half", "method"), SNIPPETS)
def test_a_repository_holds_what_its_card_loads(half, method, trained, tmp_path) -> None:
    """Of method full the whole pipeline; the folder that the other half lay in is on no card that others read."""
    settings = trained(half, **(JOBS[half] if method == "lora" else FULL))
    with artifact.opened(archive_of(settings)) as folder:
        publish._arrange(folder, archive_of(settings), tmp_path, "me/robot", [])
        cards = [(where / artifact.CARD).read_text(encoding="utf-8") for where in (folder, tmp_path)]
    assert not any(name in card for card in cards for name in (settings.base_model, settings.companion_model))
    header = yaml.safe_load(cards[1].split("---\n")[1])
    assert {"kandinsky", "text-to-image", "diffusers"} < set(header["tags"])
    assert ("prior" in header["tags"]) == (half == "prior")
    assert header.get("prior") == (["kandinsky-community/kandinsky-2-2-prior"] if half == "decoder" else None)
    assert '"me/robot"' in cards[1] and "kandinsky-community" in cards[1]
    whole = {"model_index.json", "scheduler", {"prior": "prior", "decoder": "unet"}[half]}
    assert whole <= {path.name for path in tmp_path.iterdir()} if method == "full" else (tmp_path / LORA_FILE).is_file()
    assert not (tmp_path / "comfyui").exists()


def test_the_cards_code_for_a_prior_with_new_tokens_draws_the_same(trained, run_code, tiny_decoder) -> None:
    settings = trained("prior", method="pivotal", text_embedding_lr=0.5)
    generator = Generator(str(tiny_decoder), "cpu")
    expected = {}
    for weights in ((), (archive_of(settings),)):
        generator.use(*weights)
        expected[weights] = np.asarray(
            generator.draw_prompts(["a photo of TOK"], [7], DrawSettings(prompt="", **CALL))[0]
        )
    card = (settings.output_dir / artifact.CARD).read_text(encoding="utf-8")
    found = run_code(card.split("```python\n")[1].split("```")[0])
    before, after = expected.values()
    assert (before != after).any() and np.abs(found.astype(int) - after).max() <= 1
