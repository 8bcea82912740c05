"""Weights in other programs' formats draw what our own archive of them draws; what does not fit is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preprocessing.errors import UserError
from tests.trainer.pictures import drawn
from trainer import artifact, foreign
from trainer.generate import Generator

XL_ONLY = pytest.mark.parametrize("tiny_model", ["xl"], indirect=True)
SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


@pytest.fixture
def trained(train_variant) -> Callable[..., Path]:
    """Trains a variant a little; gives the folder of its archive."""
    return lambda variant, **changes: train_variant(variant, **changes)[0]


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(str(tiny_model), "cpu")


def with_weights(generator: Generator, weights: Path) -> np.ndarray:
    generator.use(weights)
    return drawn(generator)


def same(generator: Generator, ours: Path, theirs: Path, levels: int = 0) -> None:
    expected = with_weights(generator, ours)
    generator.release()
    base = drawn(generator)
    assert np.abs(expected - base).max() > levels  # there is something to be seen
    assert np.abs(with_weights(generator, theirs) - expected).max() <= levels


@pytest.mark.parametrize("variant", ["lora", "lora text"])
@pytest.mark.parametrize("member", ["comfyui/adapter.safetensors", artifact.ADAPTER])
def test_one_file_of_ours_is_enough(variant: str, member: str, trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained(variant)
    theirs = tmp_path / "no extension"
    theirs.write_bytes((ours / member).read_bytes())
    same(generator, ours, theirs)


@SD_ONLY
@pytest.mark.parametrize("member", ["comfyui/adapter.safetensors", artifact.ADAPTER])
def test_dora_too(member: str, trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained("pivotal dora", method="lora")
    same(generator, ours, ours / member)


@SD_ONLY
def test_pefts_own_folder(trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained("lora")
    theirs = tmp_path / "peft"
    theirs.mkdir()
    tensors = load_file(ours / artifact.ADAPTER)
    named = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in tensors.items()}
    save_file(named, theirs / "adapter_model.safetensors")
    config = artifact.read_manifest(ours).nets["unet"]
    (theirs / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    same(generator, ours, theirs)
    (theirs / "adapter_config.json").unlink()  # without it alpha is taken for the rank
    assert (with_weights(generator, theirs) != with_weights(generator, ours)).any()


def in_old_keys(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """As diffusers named the attention processors' LoRA at the time of cog-sdxl."""
    renamed = {}
    for key, value in tensors.items():
        attention, _, rest = key.removeprefix("unet.").rpartition(".attn")
        number, module, part = rest[0], rest[2:].partition(".lora_")[0], rest.rpartition(".lora_")[2]
        direction = {"A.weight": "down", "B.weight": "up"}[part]
        name = module.removesuffix(".0")
        renamed[f"{prefix}{attention}.attn{number}.processor.{name}_lora.{direction}.weight"] = value
    return renamed


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def as_file(tensors: dict[str, Tensor], path: Path) -> bytes:
    save_file(tensors, path)
    return path.read_bytes()


@XL_ONLY
def test_cog_sdxls_archive(trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained("pivotal", lora_alpha=None, class_word="")
    rows = load_file(ours / artifact.EMBEDDINGS)
    lora = in_old_keys(load_file(ours / artifact.ADAPTER), "unet.")
    files = {
        "lora.safetensors": as_file(lora, tmp_path / "lora"),
        "embeddings.pti": as_file(
            {"text_encoders_0": rows["clip_l"], "text_encoders_1": rows["clip_g"]}, tmp_path / "rows"
        ),
        "special_params.json": json.dumps({"TOK": "<s0><s1>"}).encode(),
        "training_out/log.bin": b"left out",
    }
    same(generator, ours, pack(tmp_path / "theirs.tar", files))
    odd = files | {"special_params.json": json.dumps({"TOK": "<s0>"}).encode()}
    with pytest.raises(UserError, match="there are 2 tokens"):
        generator.use(pack(tmp_path / "odd.tar", odd))


@SD_ONLY
def test_an_embedding_alone_in_every_spelling(trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained("inversion")
    rows = load_file(ours / artifact.EMBEDDINGS)["clip_l"]
    expected = with_weights(generator, ours)
    for name, tensors in {
        "A1111": {"emb_params": rows},
        "in a bundle": {"bundle_emb.TOK.string_to_param.*": rows},
        "diffusers": {"TOK": rows},
    }.items():
        save_file(tensors, tmp_path / "theirs.safetensors")
        assert (with_weights(generator, tmp_path / "theirs.safetensors") == expected).all(), name
        assert generator.manifests[0].trigger_word == "TOK"
    save_file({"<robo>": rows[0]}, tmp_path / "one.safetensors")  # as textual_inversion.py of diffusers leaves it
    generator.use(tmp_path / "one.safetensors")
    assert generator.manifests[0].trigger_word == "<robo>" and len(generator.manifests[0].tokens) == 1
    prompt = "a photo of <robo>"
    assert (drawn(generator, prompt) == drawn(generator, "a photo of <s0>")).all()


@SD_ONLY
def test_lycoris_three_factors_of_a_convolution(generator: Generator, tmp_path: Path) -> None:
    """What the file says by its own rule, alpha / rank * up x middle x down, is what is added to the weight."""
    name, rank = "down_blocks.0.resnets.0.conv1", 3
    weight = generator.family.module("unet").get_submodule(name).weight.detach().clone()
    sizes = {"up": (weight.shape[0], rank, 1, 1), "mid": (rank, rank, 3, 3), "down": (rank, weight.shape[1], 1, 1)}
    parts = {part: torch.randn(size) for part, size in sizes.items()}
    stem = "lora_unet_" + name.replace(".", "_")
    stored = {f"{stem}.lora_{part}.weight": value for part, value in parts.items()}
    save_file(stored | {f"{stem}.alpha": torch.tensor(1.5)}, tmp_path / "x.safetensors")
    generator.use(tmp_path / "x.safetensors")
    layer = generator.family.module("unet").get_submodule(name)
    up, middle, down = (parts[part].squeeze() for part in ("up", "mid", "down"))
    expected = 1.5 / rank * torch.einsum("or,rskl,si->oikl", up, middle, down)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@SD_ONLY
def test_old_keys_without_a_net(trained, generator: Generator, tmp_path: Path) -> None:
    ours = trained("lora", lora_alpha=None, lora_targets="attention")
    theirs = tmp_path / "old.safetensors"
    save_file(in_old_keys(load_file(ours / artifact.ADAPTER), ""), theirs)
    same(generator, ours, theirs)


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{KOHYA}.lora_down.weight": torch.ones(2, 16), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)}
MISFITS = [
    (PAIR | {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 16)}, "lora_unet_nowhere"),
    (PAIR | {f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a"),
    ({f"{KOHYA}.lora_down.weight": torch.ones(2, 16)}, "attn1.to_q"),
    ({key: torch.ones(3, 3) for key in PAIR}, "do not fit the base model's unet"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}, "FLUX"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 2)}, "FLUX"),
    ({"clip_l": torch.ones(2, 5)}, "token embeddings clip_l"),
    ({"clip_l": torch.ones(5)}, "token embeddings"),
]


MISFITS += [
    ({f"{KOHYA}.{ending}": torch.ones(2, 2)}, told)
    for ending, told in (
        ("hada_w2_b", r"are LoHa \(LyCORIS\), which is not read"),
        ("lokr_w1", r"are LoKr \(LyCORIS\)"),
        ("oft_blocks", "are OFT"),
        ("on_input", r"are \(IA\)\^3"),
        ("a1.weight", "are GLoRA"),
        ("diff", "a difference of full weights"),
    )
] + [
    ({"bundle_emb.A.clip_l": torch.ones(2, 32), "bundle_emb.B.clip_l": torch.ones(2, 32)} | PAIR, "several embeddings"),
    ({"bundle_emb.A.clip_l_out": torch.ones(2, 32)} | PAIR, "'clip_l_out', which is not read"),
]


@SD_ONLY
@pytest.mark.parametrize(("tensors", "told"), MISFITS)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], told: str, generator: Generator, tmp_path: Path
) -> None:
    generator.release()
    before = drawn(generator)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=told):
        generator.use(tmp_path / "x.safetensors")
    assert (drawn(generator) == before).all()


@SD_ONLY
@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.safetensors": PAIR, "b.safetensors": PAIR}, "several files"),
        ({"a.safetensors": b"\x10\0\0\0\0\0\0\0{cut"}, "not a whole .safetensors"),
        ({"special_params.json": b"{}"}, "no .safetensors file"),
        ({"a.safetensors": PAIR, "special_params.json": b"[1]"}, "no JSON object"),
        ({"a.safetensors": PAIR, "special_params.json": b"{" * 10_000}, "damaged"),
        ({"a.safetensors": PAIR, "special_params.json": b'{"A": "<s0>", "a": "<s1>"}'}, "one word is wanted"),
        ({"model.bin": b"\x80\x02."}, "pickle"),
        ({"../a.safetensors": PAIR}, "plain relative name"),
    ],
)
def test_archives_that_hold_no_weights(files: dict[str, Any], told: str, generator: Generator, tmp_path: Path) -> None:
    packed = {n: c if isinstance(c, bytes) else as_file(c, tmp_path / "one") for n, c in files.items()}
    with pytest.raises(UserError, match=told):
        generator.use(pack(tmp_path / "theirs.tar", packed))


@pytest.mark.parametrize("content", [b"PK\x03\x04rest", b"\x80\x02}q\x00.", b"", b"hello"])
def test_pickles_and_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError), foreign.unpacked(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    ("tensors", "header", "base"),
    [
        ({"lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(4, 768)}, {}, "stable-diffusion-v1-5"),
        ({"unet.x.attn2.processor.to_k_lora.down.weight": torch.ones(4, 1024)}, {}, "stable-diffusion-2-1"),
        ({"unet.x.attn2.to_k.lora_A.weight": torch.ones(4, 2048)}, {}, "stable-diffusion-xl"),
        ({"unet.x.attn2.to_k.lora_A.weight": torch.ones(4, 5)}, {}, None),
        ({"text_encoders_1": torch.ones(2, 1280)}, {}, "stable-diffusion-xl"),
        ({"unet.x.attn2.to_k.lora_A.weight": torch.ones(4, 5)}, {"base_model": "toybox"}, "toybox"),
    ],
)
def test_the_usual_base_is_told_by_the_shape(
    tensors: dict[str, Tensor], header: dict[str, str], base: str | None, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata=header or None)
    found = foreign.base_of(tmp_path)
    assert found is None if base is None else base in found


FLUX_ONLY = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
TUNER = "output/flux_train_replicate"  # where flux-fine-tuner's tar has its files
TUNER_CONFIG = """
job: custom_job
config:
  name: flux_train_replicate
  process:
  - type: custom_sd_trainer
    training_folder: output
    trigger_word: WORD
    network: {type: lora, linear: 16, linear_alpha: 16}
"""


@FLUX_ONLY
@pytest.mark.parametrize(
    ("config", "word"),
    [
        (TUNER_CONFIG.replace("WORD", "NDRS"), "NDRS"),
        (TUNER_CONFIG.replace("trigger_word: WORD", "device: cuda:0"), "TOK"),
        (None, "TOK"),
        ("just: [a, file]", "TOK"),
        ("config: {process: {}}", "TOK"),
        ("a: &a [*a]\nconfig: [1]", "TOK"),
    ],
)
def test_flux_fine_tuners_archive_tells_its_trigger(
    config, word, trained, generator: Generator, tmp_path: Path
) -> None:
    ours = trained("lora", lora_alpha=None, lora_targets="attention")
    weights = as_file(load_file(ours / artifact.ADAPTER), tmp_path / "plain")
    files = {f"{TUNER}/lora.safetensors": weights, f"{TUNER}/optimizer.pt": b"never read", f"{TUNER}/a b.txt": b""}
    if config is not None:
        files[f"{TUNER}/config.yaml"] = config.encode()
    theirs = pack(tmp_path / "theirs.tar", files)
    same(generator, ours, theirs)
    generator.use(theirs)
    assert generator.manifests[0].trigger_word == word
    assert foreign.base_of(ours) == str(generator.base_model)


@FLUX_ONLY
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"config: [", "config.yaml of the weights is damaged"),
        (b"\xff\xfe\xff", "damaged"),
        (b"[" * 5000, "damaged"),
        (b"#" * (2**20 + 1), "longer than 1 MiB"),
        (b"!!python/object/apply:os.system [true]", "damaged"),
        (TUNER_CONFIG.replace("WORD", "two words").encode(), "one word is wanted"),
    ],
)
def test_a_configuration_that_is_none_is_told(config, words, trained, generator: Generator, tmp_path: Path) -> None:
    weights = as_file(load_file(trained("lora") / artifact.ADAPTER), tmp_path / "plain")
    theirs = pack(tmp_path / "theirs.tar", {"lora.safetensors": weights, "config.yaml": config})
    with pytest.raises(UserError, match=words):
        generator.use(theirs)
