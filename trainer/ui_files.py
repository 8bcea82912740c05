"""The weights as ComfyUI, A1111, Forge and diffusers' own loaders read them: the folder comfyui/ of an archive.

    adapter.safetensors                     LoRA in kohya's keys (trainer.kohya)
    embeddings/TOK.safetensors              the new tokens of each trigger word; these programs call an embedding by
                                            its file's name
    adapter_with_embeddings.safetensors     both in one file, the tokens under bundle_emb.TOK.: A1111 reads it as a
                                            LoRA, ComfyUI as a LoRA and, in its folder of embeddings, as an embedding

diffusers' LoRA loader knows no bundle_emb keys, so that the plain files are written beside the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from trainer import artifact, kohya
from trainer.artifact import Manifest
from trainer.families.base import Family
from trainer.methods import METHODS

FOLDER, LORA, BUNDLED, EMBEDDING_FOLDER = "comfyui", "adapter", "adapter_with_embeddings", "embeddings"
BUNDLE = "bundle_emb"  # bundle_emb.<name>.<key of the embedding file>


def embedding_name(trigger: str) -> str:
    """The trigger word as a file's name, by which ComfyUI and A1111 call an embedding: letters, digits, "_", "-"."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", trigger).lstrip("-")[:64] or "embedding"


def embedding_names(manifest: Manifest) -> dict[str, str]:
    """The name of each trigger word's embedding; no two are the same."""
    names: dict[str, str] = {}
    for one in manifest.words:
        name, taken = embedding_name(one.trigger_word), {other.casefold() for other in names.values()}
        alike = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 2)))
        names[one.trigger_word] = next(one for one in alike if one.casefold() not in taken)
    return names


def rows_by_trigger(rows: dict[str, Tensor], manifest: Manifest) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of each trigger word's own tokens, of all `rows` (as in embeddings.safetensors)."""
    start = 0
    for one in manifest.words:
        end = start + len(one.tokens)
        yield one.trigger_word, {key: value[start:end] for key, value in rows.items()}
        start = end


def write(
    folder: Path, family: Family, manifest: Manifest, tensors: dict[str, Tensor], rows: dict[str, Tensor]
) -> None:
    """Write LoRA `tensors` (keys as in adapter.safetensors) and `rows` (as in embeddings.safetensors) into `folder`.

    Either may be empty; the bundle is written where there are both. Nothing is for a family that these programs load no
    adapters for, nor for a method whose adapters they would let act elsewhere; of LoKr and OFT only the tokens, but for
    what `Family.ui_adapters` names. Raises as `Family.export_comfyui` does.
    """
    method = METHODS[manifest.method]
    if not family.ui_files or method.draws_from_conditions or not method.in_stock_pipelines:
        return
    if artifact.adapter_type(manifest.nets) not in family.ui_adapters:
        tensors = {}
        if not rows:
            return
    folder.mkdir(parents=True, exist_ok=True)
    names, lora = embedding_names(manifest), folder / f"{LORA}.safetensors"
    if tensors:
        family.export_comfyui(lora, tensors, manifest)
    if not rows:
        return
    keys = {key: family.ui_embedding_keys.get(key, (key, key)) for key in rows}
    (folder / EMBEDDING_FOLDER).mkdir(exist_ok=True)
    parts = dict(rows_by_trigger(rows, manifest))
    for trigger, own in parts.items():
        alone = manifest.model_copy(update={"trigger_word": trigger, "concepts": ()})
        artifact.save_tensors(
            folder / EMBEDDING_FOLDER / f"{names[trigger]}.safetensors",
            {keys[key][0]: value for key, value in own.items()},
            embedding_header(own, alone, family.describe().get("prediction_type")),
        )
    if tensors:
        stored, header = artifact.load_tensors(lora)
        for trigger, own in parts.items():
            stored |= {f"{BUNDLE}.{names[trigger]}.{keys[key][1]}": value for key, value in own.items()}
        hashes = dict.fromkeys(artifact.HASHES.keys() & header.keys(), artifact.HASH_TO_COME)
        artifact.save_tensors(folder / f"{BUNDLED}.safetensors", stored, header | hashes)


def embedding_header(rows: dict[str, Tensor], manifest: Manifest, prediction_type: str | None) -> dict[str, str]:
    """What model managers read from the header of an embedding file."""
    width = sum(value.shape[1] for value in rows.values())
    return kohya.modelspec(manifest, prediction_type) | kohya.architecture(width, "textual-inversion", prediction_type)
