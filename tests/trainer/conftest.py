"""Tiny base models built from config, in the shapes of SD 1.5 and SDXL, and a small prepared data set."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from preprocessing.prepared import PreparedDataset, PreparedItem
from tests.trainer import kandinsky
from tests.trainer.flux_models import tiny_pipeline, tiny_transformer
from tests.trainer.lab import Lab
from tests.trainer.omnigen2_models import save_tiny
from tests.trainer.tiny import SIDE, tiny_text_config, tiny_tokenizer, tiny_unet, tiny_vae
from trainer import delivery, families, job, methods
from trainer.artifact import load_tensors
from trainer.config import CONDITION_DEFAULTS, JobSettings
from trainer.families.base import DENOISER, TEXT, VAE, Family
from trainer.fitting import Fitted
from trainer.methods.base import Method
from trainer.metrics import METRICS_FILE, read_metrics

# previews are drawn by every whole job
FEW_STEPS = json.dumps({"draw": {"num_inference_steps": 2, "prior_num_inference_steps": 2}})

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder: 32x32 pictures, 16x16 latents, epsilon."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "sd"
    pipe.save_pretrained(folder)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder: two text encoders of different width, pooled text, time ids."""
    torch.manual_seed(0)
    first, second = tiny_tokenizer(), tiny_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second, hidden_size=48, projection_dim=40)),
        tokenizer=first,
        tokenizer_2=second,
        unet=tiny_unet(
            cross_attention_dim=80,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    folder = tmp_path_factory.mktemp("models") / "xl"
    pipe.save_pretrained(folder)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KandinskyV22PriorPipeline folder: vectors of 32 numbers."""
    folder = tmp_path_factory.mktemp("models") / "prior"
    tokenizer = tiny_tokenizer()
    kandinsky.save_prior(folder, tokenizer, tiny_text_config(tokenizer, num_hidden_layers=2))
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory, tiny_prior: Path) -> Path:
    """A KandinskyV22Pipeline folder: 32x32 pictures, 16x16 latents, epsilon and a learned variance."""
    folder = tmp_path_factory.mktemp("models") / "decoder"
    kandinsky.save_decoder(folder, tiny_prior)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def build_transformer() -> Callable[[bool], FluxTransformer2DModel]:
    """Makes FLUX's transformer with or without built-in guidance."""
    return tiny_transformer


def save_flux(folder: Path, guided: bool) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    encoder = CLIPTextModel(tiny_text_config(tokenizer))
    tiny_pipeline(guided, (tokenizer, encoder), tiny_vae()).save_pretrained(folder)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder in the shape of dev: guidance built in."""
    return save_flux(tmp_path_factory.mktemp("models") / "flux", guided=True)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder in the shape of schnell: no guidance."""
    return save_flux(tmp_path_factory.mktemp("models") / "schnell", guided=False)


@pytest.fixture(scope="session")
def tiny_omnigen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OmniGen2Pipeline folder: 32x32 pictures, 16x16 latents of 4 channels."""
    folder = tmp_path_factory.mktemp("models") / "omnigen2"
    save_tiny(folder)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_kontext(tmp_path_factory: pytest.TempPathFactory, tiny_flux: Path) -> Path:
    """The tiny FLUX as a FluxKontextPipeline folder."""
    folder = tmp_path_factory.mktemp("models") / "kontext"
    FluxKontextPipeline.from_pretrained(tiny_flux, dtype=torch.float32).save_pretrained(folder)
    (folder / families.RECOMMENDED).write_text(FEW_STEPS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session", params=["sd", "xl"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny base models; tests of FLUX ask for "flux" or "schnell"."""
    return request.getfixturevalue(f"tiny_{request.param}")


def make_dataset(folder: Path, count: int = 4, masked: bool = False) -> PreparedDataset:
    """`count` prepared pictures of one bucket, each a coloured square on noise."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    items = []
    for i in range(count):
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[8:24, 8:24] = rng.integers(100, 256, 3)
        Image.fromarray(pixels).save(folder / f"images/{i:06d}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[8:24, 8:24] = 255
        Image.fromarray(mask).save(folder / f"masks/{i:06d}.png")
        items.append(
            PreparedItem(
                image=f"images/{i:06d}.png",
                mask=f"masks/{i:06d}.png" if masked else None,
                caption=f"a photo of TOK number {i}",
                caption_source="user",
                source=f"{i}.png",
                original_size=(SIDE, SIDE),
                resized_size=(SIDE, SIDE),
                crop=(0, 0),
                size=(SIDE, SIDE),
            )
        )
    dataset = PreparedDataset(
        items=tuple(items), trigger_word="TOK", resolution=SIDE, dataset_hash=f"hash-{count}-{masked}", folder=folder
    )
    dataset.save()
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    return make_dataset(tmp_path / "dataset")


@pytest.fixture
def masked_dataset(tmp_path: Path) -> PreparedDataset:
    return make_dataset(tmp_path / "masked", masked=True)


@pytest.fixture
def one_picture(tmp_path: Path) -> PreparedDataset:
    return make_dataset(tmp_path / "one", count=1)


@pytest.fixture
def job_settings(tmp_path: Path, tiny_sd: Path) -> JobSettings:
    """Complete settings of a short job on the tiny SD model; tests change what they are about."""
    return JobSettings(
        input_images=tmp_path,
        base_model=str(tiny_sd),
        output_dir=tmp_path / "out",
        captioner="none",
        resolution=SIDE,
        lora_rank=4,
        lora_targets="attention",
        optimizer="adamw",
        learning_rate=1e-3,
        text_embedding_lr=1e-3,
        max_train_steps=4,
        train_batch_size=2,
        preservation_weight=0.0,
        n_tokens=2,
        report_to="none",
        mixed_precision="no",
        holdout=0,
        evaluate_every=1000,  # before the first step and after the last; in between, the tests of evaluation ask
    )


def load(source: Path) -> Family:
    """A whole base model on the CPU, in fp32."""
    return families.family_class(str(source)).load(str(source), frozenset({DENOISER, TEXT, VAE}), torch.float32)


@pytest.fixture(scope="session")
def load_family() -> Callable[[Path], Family]:
    """Loads a whole base model anew."""
    return load


VARIANTS: dict[str, dict[str, Any]] = {
    "pivotal": {"method": "pivotal", "lora_alpha": 7.0, "class_word": "dog"},
    "pivotal dora": {"method": "pivotal", "use_dora": True, "lora_targets": "attention_conv"},
    "inversion": {"method": "textual_inversion"},
    "lora": {"method": "lora", "lora_alpha": 2.0, "lora_targets": "all"},
    "lora text": {"method": "lora", "train_text_encoder": True},
    "full": {"method": "full"},
    "full text": {"method": "full", "train_text_encoder": True},
    "prefix": {"method": "prefix", "num_prefix_tokens": 4, "prefix_on_negative": True},
    "perfusion": {"method": "perfusion", "class_word": "dog"},
}


@pytest.fixture
def create(job_settings: JobSettings, tiny_model: Path) -> Callable[..., Method]:
    """Makes a variant's method, with any changes to its settings."""

    def made(variant: str, **changes: Any) -> Method:
        stored = job_settings.model_dump() | {"base_model": str(tiny_model)} | VARIANTS[variant] | changes
        return methods.create(JobSettings.model_validate(stored))

    return made


@pytest.fixture(scope="session")
def untouched(tiny_model: Path) -> Family:
    """Each of the tiny base models, to copy."""
    return load(tiny_model)


@pytest.fixture
def lab(untouched: Family) -> Lab:
    """Each of the tiny base models, fresh."""
    return Lab(copy.deepcopy(untouched))


@pytest.fixture
def random_weights(
    lab: Lab, dataset: PreparedDataset, job_settings: JobSettings, tiny_model: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Makes the folder of an archive with random weights; the same seed and layers give the same ones."""

    def made(name: str, seed: int, **changes: Any) -> Path:
        given = job_settings.model_dump(exclude={*CONDITION_DEFAULTS, "lora_targets"})
        own = {"base_model": str(tiny_model)}
        settings = JobSettings.model_validate(given | own | changes)
        settings.output_dir.mkdir(exist_ok=True)
        (settings.output_dir / METRICS_FILE).touch()
        method = methods.create(settings)
        for i, parameter in enumerate(p for group in method.attach(lab.family) for p in group.parameters):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        folder = tmp_path / name
        folder.mkdir()
        delivery.save_weights(folder, lab.family, method, dataset, delivery.Run(settings, 1))
        method.detach(lab.family)
        return folder

    return made


@pytest.fixture
def train_variant(
    lab: Lab, create: Callable[..., Method], dataset: PreparedDataset, tmp_path: Path
) -> Callable[..., tuple[Path, Method]]:
    """Trains a variant a little; gives the folder of its archive, and the method, still attached."""

    def trained(variant: str, **changes: Any) -> tuple[Path, Method]:
        method = create(variant, **changes)
        lab.train(method)
        folder = tmp_path / f"weights-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        method.settings.output_dir.mkdir(exist_ok=True)
        (method.settings.output_dir / METRICS_FILE).touch()
        delivery.save_weights(folder, lab.family, method, dataset, delivery.Run(method.settings, 3))
        delivery.add_exports(folder, lab.family)
        return folder, method

    return trained


@dataclass(frozen=True)
class Trained:
    """What a job left before anything was drawn: its weights, its metrics by step, its last checkpoint."""

    weights: Path
    tensors: dict[str, torch.Tensor]  # adapter and embeddings together
    rows: list[dict[str, Any]]
    state: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


def read_trained(output_dir: Path) -> Trained:
    """Read what `train_on` left in `output_dir`."""
    weights = output_dir / "delivered"
    tensors = {key: value for path in weights.glob("*.safetensors") for key, value in load_tensors(path)[0].items()}
    state = max((output_dir / "checkpoints").glob("step_*/info.json")).with_name("state.pt")
    return Trained(weights, tensors, read_metrics(output_dir / METRICS_FILE), torch.load(state, weights_only=True))


@pytest.fixture(scope="session")
def read_job() -> Callable[[Path], Trained]:
    """Reads what `train_on` left in a folder."""
    return read_trained


@pytest.fixture
def settings(job_settings: JobSettings) -> Callable[..., JobSettings]:
    """The short job's settings with changes, checked."""
    return lambda **changes: JobSettings.model_validate(job_settings.model_dump() | changes)


@pytest.fixture
def train_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """Runs the real job on a prepared data set, up to the weights; nothing is prepared and nothing is drawn."""

    def run(settings: JobSettings, dataset: PreparedDataset, progress: job.Progress | None = None) -> Trained:
        def keep(fitted: Fitted, *_: object) -> None:
            shutil.copytree(fitted.weights, settings.output_dir / "delivered", dirs_exist_ok=True)

        monkeypatch.setattr(job, "prepared", lambda *_: dataset)
        monkeypatch.setattr(job, "finish", keep)
        job.train(settings, progress)
        return read_trained(settings.output_dir)

    return run
