"""Adapter weights in memory, in our archive's layout: what exports are written from and ranks are changed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import Family
from trainer.methods.tokens import token_names, words_of


@dataclass(frozen=True)
class Weights:
    """`tensors` as in adapter.safetensors, `rows` as in embeddings.safetensors; either may be empty."""

    manifest: Manifest
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Weights:
        """From an opened archive; UserError where a file that its manifest speaks of is missing or damaged."""
        manifest = artifact.read_manifest(folder)
        whole = manifest.nets or manifest.method == "full"
        return cls(
            manifest,
            artifact.load_tensors(folder / artifact.ADAPTER)[0] if whole else {},
            artifact.load_tensors(folder / artifact.EMBEDDINGS)[0] if manifest.tokens else {},
        )

    def write(self, folder: Path) -> None:
        """Into the folder of an archive: manifest, adapter and embeddings."""
        artifact.write_manifest(folder, self.manifest)
        for name, tensors in ((artifact.ADAPTER, self.tensors), (artifact.EMBEDDINGS, self.rows)):
            if tensors:
                artifact.save_tensors(folder / name, tensors, artifact.adapter_header(tensors, self.manifest))

    def cast(self, dtype: torch.dtype) -> Weights:
        """The same in another precision."""
        return replace(
            self,
            tensors={key: value.to(dtype) for key, value in self.tensors.items()},
            rows={key: value.to(dtype) for key, value in self.rows.items()},
        )


def manifest_for(family: Family, base_model: str, settings: JobSettings, nets: dict[str, dict]) -> Manifest:
    """The manifest of weights that no job of ours made: their settings say the method, the trigger and the tokens."""
    has_tokens = settings.method in ("pivotal", "textual_inversion")
    names = [name for names in token_names(settings).values() for name in names] if has_tokens else []
    return Manifest(
        base_model=base_model,
        base_hash="",
        family=family.name,
        method=settings.method,
        **words_of(settings, names),
        settings=settings.model_dump(mode="json"),
        dataset_hash="",
        step=0,
        created=datetime.now(UTC),
        nets=nets,
    )


def modules(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Net, path of the module in it, and its tensors by what they are ("lora_A.weight", ...), of LoRA `tensors`."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        net, _, rest = key.partition(".")
        module, _, part = rest.partition(".lora_")
        found.setdefault((net, module), {})[f"lora_{part}"] = value
    for (net, module), parts in found.items():
        yield net, module, parts
