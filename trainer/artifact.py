"""The archive of weights: what a finished job leaves, and the one way in for what others send.

    manifest.json           Manifest below
    adapter.safetensors     diffusers/peft keys ("unet.", "text_encoder.", "text_encoder_2." and the module's path)
    embeddings.safetensors  clip_l [n, d], clip_g [n, d]: the new tokens, where the method has them
    prefix.safetensors      text_encoder.prompt_embeddings [P, d], ...: the vectors before the input of text encoders
    comfyui/                the same weights as other programs load them (trainer.ui_files)
    README.md               the model card
    base/                   configuration and tokenizer of a base model that the job built; its weights are the adapter
    evaluation.json         how good they are (trainer.evaluation.summary.Summary)
    config.yaml, captions.jsonl, metrics.jsonl, report.html, samples/*.png

An archive may come from anybody: trainer.unpack says what is let in.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from preprocessing.errors import UserError
from trainer.unpack import LIMITS, Limits, Wanted, fault_of, unpack

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

FORMAT_VERSION = 1
MANIFEST, ADAPTER, EMBEDDINGS = "manifest.json", "adapter.safetensors", "embeddings.safetensors"
PREFIX = "prefix.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers' load_lora_weights looks
EVALUATION = "evaluation.json"
CARD = "README.md"
BASE = "base"  # folder of a base model's configuration, without weights
MEMBERS = (
    MANIFEST,
    ADAPTER,
    EMBEDDINGS,
    PREFIX,
    "comfyui/*.safetensors",
    "comfyui/embeddings/*.safetensors",
    CARD,
    "base/*.json",
    "base/*/*.json",
    "config.yaml",
    "captions.jsonl",
    "metrics.jsonl",
    EVALUATION,
    "report.html",
    "samples/*.png",
)
# Header values that stand for the SHA-256 of the tensors until they are written, by the keys that want it.
HASH_TO_COME = "0x" + 64 * "0"
HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}  # field -> what it begins with
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "prodigyopt", "safetensors", "numpy", "pillow")


class Word(BaseModel):
    """A trigger word, the new tokens that it stands for, in order, and what it calls in one word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trigger_word: str
    tokens: tuple[str, ...] = ()
    class_word: str = ""


class Manifest(BaseModel):
    """What an archive of weights says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: int = FORMAT_VERSION
    base_model: str  # as the user named it
    base_hash: str  # of the base model's weights
    base_license: str = ""  # as its own card calls it; "" where that is not known
    family: str
    method: str
    trigger_word: str
    tokens: tuple[str, ...] = ()  # the new tokens that the trigger (of several: all triggers) stands for, in order
    class_word: str = ""
    settings: dict[str, Any]  # every setting of the job with the value that was used
    dataset_hash: str
    step: int  # the optimiser step that the weights are from
    created: datetime
    chosen: str = ""  # why the weights are of that step, in a sentence
    scores: dict[str, float] = {}
    libraries: dict[str, str] = {}  # distribution -> version
    nets: dict[str, dict[str, Any]] = {}  # key prefix of a net -> its configuration of peft's, see `lora_config_dict`
    started_from: dict[str, str] = {}  # what init_adapter named, and the SHA-256 of its content
    concepts: tuple[Word, ...] = ()  # where several were taught: each, of which the first is told above too

    @property
    def words(self) -> tuple[Word, ...]:
        """Every trigger word; of an archive of one concept that one."""
        return self.concepts or (Word(trigger_word=self.trigger_word, tokens=self.tokens, class_word=self.class_word),)

    @property
    def special_params(self) -> dict[str, str]:
        """What stands for what, as {"TOK": "<s0><s1>", "CAT": "<s2><s3>"}; nothing where there are no new tokens."""
        return {one.trigger_word: "".join(one.tokens) for one in self.words if one.tokens}

    @property
    def title(self) -> str:
        """The trigger words, for people and in prompts."""
        return " and ".join(one.trigger_word for one in self.words)

    @property
    def called(self) -> str:
        """What is taught as prompts of other programs call it: by tokens, or else by trigger words."""
        return " and ".join("".join(one.tokens) or one.trigger_word for one in self.words)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide what training gives, found without importing them."""
    versions = {}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # not each of them is needed everywhere
            versions[name] = metadata.version(name)
    return versions


def lora_config_dict(config: PeftConfig) -> dict[str, Any]:
    """A configuration of peft's as plain JSON values, its sets as sorted lists: its class with `**it` gives it back."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it when the block ends well, removed when it does not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder that is to become an archive of weights."""
    with written_whole(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an unpacked archive; UserError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}; give the trained_model.tar that train.py wrote, or its folder.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or JSON made to exhaust the stack
        raise UserError(f"{MANIFEST} of the weights is damaged ({error}); train again or copy it again.") from error
    version = stored.get("format_version") if isinstance(stored, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{MANIFEST} of the weights is of format {version!r}, and this program reads format {FORMAT_VERSION}; "
            "use the version of the program that wrote it."
        )
    try:
        return Manifest.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{MANIFEST} of the weights: {field}: {first['msg']}; train again or copy it again.") from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> None:
    """Write a .safetensors file whole; the same tensors and header (strings) always give the same bytes.

    A header with a field of HASHES gets the SHA-256 of everything behind the header there.
    """
    from safetensors.torch import save_file

    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own: safetensors makes files that nobody else may read
        save_file(stored, temporary, metadata={"format": "pt"} | (header or {}))
        temporary.chmod(mode)
        _finish_header(temporary)


def _finish_header(path: Path) -> None:
    """Fill in hashes, and put the metadata of a .safetensors file in order: safetensors writes a hash map's."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header["__metadata__"]
        if HASHES.keys() & metadata.keys():
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            metadata |= {field: start + digest for field, start in HASHES.items() if field in metadata}
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"the header of {path} grew from {length} to {len(text)} bytes when it was sorted")
        file.seek(8)
        file.write(text.ljust(length))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the header of a .safetensors file; UserError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"{path.name} is missing from the weights; train again or copy them again.") from error
    except SafetensorError as error:
        raise UserError(f"{path.name} is not a whole .safetensors file ({error}); copy it again.") from error


def nets_of(folder: Path) -> set[str]:
    """Names of the nets that an unpacked archive has weights of, "tokens" for its token embeddings, "prefix" for its
    prefix.
    """
    from safetensors import safe_open

    nets = {name for name, file in (("tokens", EMBEDDINGS), ("prefix", PREFIX)) if (folder / file).is_file()}
    if (folder / ADAPTER).is_file():
        with safe_open(folder / ADAPTER, framework="pt", device="cpu") as file:
            nets |= {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    return nets


def adapter_type(nets: dict[str, dict[str, Any]]) -> str:
    """Of `Manifest.nets` what its adapters are, as the setting of that name says it."""
    return str(main_config(nets).get("peft_type") or "lora").lower() if nets else "lora"


def adapter_settings(nets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of `Manifest.nets` the settings of a job that makes such adapters."""
    config, kind = main_config(nets), adapter_type(nets)
    if kind == "oft":
        return {"adapter_type": kind, "lora_rank": config["oft_block_size"]}
    if kind == "lokr":
        alpha, factor = float(config["alpha"]), config["decompose_factor"]
        return {"adapter_type": kind, "lora_rank": config["r"], "lora_alpha": alpha, "lokr_factor": factor}
    return {"adapter_type": kind, "lora_rank": config["r"], "lora_alpha": float(config["lora_alpha"])}


def main_config(nets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of `Manifest.nets` the LoraConfig whose rank and alpha stand for all: the denoiser's where it has one."""
    denoisers = (config for net, config in nets.items() if not net.startswith("text_encoder"))
    return next(denoisers, None) or next(iter(nets.values()))


def adapter_header(tensors: dict[str, torch.Tensor], manifest: Manifest) -> dict[str, str]:
    """Header of adapter.safetensors: trigger, base, rank and alpha, and each net's LoraConfig where diffusers'
    `load_lora_weights` looks for it, without which that loader takes every alpha to be the rank. Of LoKr and OFT, which
    it does not load, their type and peft's configuration of each net.

    Raises KeyError where `tensors` hold LoRA matrices of a net that the manifest has no LoraConfig of.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    header = {"trigger_word": manifest.trigger_word, "base_model": manifest.base_model, "method": manifest.method}
    adapted = sorted({name.split(".")[0] for name in tensors if ".lora_A." in name})
    if adapted:
        packed = {f"{net}.{key}": value for net in adapted for key, value in manifest.nets[net].items()}
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(packed, sort_keys=True)
        header["rank"] = json.dumps({net: manifest.nets[net]["r"] for net in adapted})
        header["alpha"] = json.dumps({net: manifest.nets[net]["lora_alpha"] for net in adapted})
    if (kind := adapter_type(manifest.nets)) != "lora" and any(f".{kind}_" in name for name in tensors):
        header |= {"adapter_type": kind, "adapter_config": json.dumps(manifest.nets, sort_keys=True)}
    return header


def write(folder: Path, archive: Path) -> None:
    """Pack the known members of a finished folder into a tar, whole; the same members give the same bytes.

    Raises FileNotFoundError without a manifest, and ValueError for a member that `opened` would refuse.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} is not finished: it has no {MANIFEST}")
    paths = [path for pattern in MEMBERS for path in folder.glob(pattern)]
    with written_whole(archive) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
            member = tarfile.TarInfo(name)  # owner, mode and time stay at their defaults: 0, 0644 and 0
            member.size = path.stat().st_size
            fault = fault_of(name, member, LIMITS)
            if fault:
                raise ValueError(f"cannot pack {path}: {fault}")
            with path.open("rb") as file:
                tar.addfile(member, file)


@contextmanager
def opened(archive: Path, limits: Limits = LIMITS, foreign: Wanted | None = None) -> Iterator[Path]:
    """Yield a folder with the members of an archive of weights, which is removed afterwards.

    `archive` is a tar, a tar.gz, or such a folder, which is yielded as it is. UserError where it is none of these,
    or where anything in it is not what an archive of weights holds; then nothing was unpacked.

    With `foreign`, a tar without a manifest is somebody else's: of its members only those that it says are wanted,
    and that are allowed in ours, are unpacked.
    """
    if archive.is_dir():
        yield archive
        return
    if not archive.is_file():
        raise UserError(f"{archive} does not exist; give the trained_model.tar that train.py wrote, or its folder.")
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        unpack(archive, Path(folder), MANIFEST, limits, foreign)
        yield Path(folder)
