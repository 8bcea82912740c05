"""Weights that a training starts from: the setting `init_adapter`, ours or of a foreign format, from anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocessing.errors import UserError, redacted
from trainer import artifact, families, foreign
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import TEXT, Family
from trainer.methods import METHODS
from trainer.methods.tokens import token_names
from trainer.weights_cache import WeightsCache

# Settings that the weights decide, so that no recommendation may fill them first.
TAKEN = ("lora_rank", "lora_alpha", "lora_targets", "n_tokens")


@dataclass(frozen=True)
class Start:
    """Opened weights in the layout of our archive, and what tells them from others."""

    folder: Path
    manifest: Manifest
    source: str  # as the user named it, without secrets
    digest: str  # SHA-256 of the tensors and the adapters' configuration

    @property
    def told(self) -> dict[str, str]:
        """For the manifest of what is trained from here."""
        return {"init_adapter": self.source, "sha256": self.digest}


@contextmanager
def opened(settings: JobSettings, family: Family) -> Iterator[Start | None]:
    """Yield what `settings.init_adapter` names, or None without one; UserError where it does not fit the family."""
    source = settings.init_adapter
    if source is None:
        yield None
        return
    with (
        WeightsCache.from_environment().held(source) as held,
        foreign.opened(held.path, family, settings.base_model) as folder,
    ):
        manifest = artifact.read_manifest(folder)
        if manifest.family not in family.serves:
            raise UserError(
                f"init_adapter was trained on a {manifest.family} ({manifest.base_model}) and {settings.base_model} is "
                f"a {family.name}: start from weights of the same family."
            )
        yield Start(folder, manifest, redacted(source), _digest(folder, manifest))


def check(source: str) -> None:
    """Raise UserError where `source` holds no weights that can be read; the base model is not needed for that."""
    with WeightsCache.from_environment().held(source) as held, foreign.unpacked(held.path) as folder:
        foreign.base_of(folder)


def _digest(folder: Path, manifest: Manifest) -> str:
    digest = hashlib.sha256(json.dumps(manifest.nets, sort_keys=True).encode())
    for name in (artifact.ADAPTER, artifact.EMBEDDINGS, artifact.PREFIX):
        if (folder / name).is_file():
            tensors, _ = artifact.load_tensors(folder / name)
            for key in sorted(tensors):
                digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}\n".encode())
                digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def agreed(settings: JobSettings, start: Start, family: Family) -> JobSettings:
    """The settings with rank, alpha, DoRA, tokens and text encoders as the weights have them.

    UserError where a setting that is not at its default says otherwise, or the method cannot start from such weights.
    """
    manifest = start.manifest
    _check_method(settings.method, manifest)
    text = {net.name for net in family.nets if net.part == TEXT}
    taken: dict[str, Any] = {}
    if manifest.nets:
        taken = artifact.adapter_settings(manifest.nets)
        taken["use_dora"] = any(one.get("use_dora", False) for one in manifest.nets.values())
    several = bool(settings.concepts or manifest.concepts)
    counts = {len(one.tokens) for one in manifest.words if one.tokens}
    # beside concepts the setting is a usual number, which one that is given for each may differ from
    if len(counts) == 1 and not (several and settings.n_tokens):
        taken["n_tokens"] = counts.pop()
    if manifest.method == "prefix":
        taken["num_prefix_tokens"] = manifest.settings["num_prefix_tokens"]
    if _adapted(start) & text:
        if settings.method == "pivotal":
            raise UserError("init_adapter adapts the text encoder, which method pivotal leaves alone: use method lora.")
        taken["train_text_encoder"] = True
    for name, value in taken.items():
        given = getattr(settings, name)
        if given not in (None, JobSettings.model_fields[name].default, value):
            raise UserError(
                f"{name} {given} does not agree with init_adapter, which has {value}: leave {name} out"
                + (", or change the rank first with python -m trainer.export --rank." if name == "lora_rank" else ".")
            )
    suits = families.suiting(settings.base_model, settings.method)
    left = {"n_tokens": suits["n_tokens"]} if manifest.nets else suits
    settings = JobSettings.model_validate(settings.model_dump() | taken).filled(left)
    if manifest.tokens and several:
        _check_concepts(settings, manifest)
    return settings


def _check_concepts(settings: JobSettings, manifest: Manifest) -> None:
    """Raise UserError where the tokens are not those of the same words in the same order."""
    there = {one.trigger_word: len(one.tokens) for one in manifest.words}
    wanted = {trigger: len(names) for trigger, names in token_names(settings).items()}
    if list(there.items()) != list(wanted.items()):
        told = ", ".join(f"{trigger} ({count} tokens)" for trigger, count in there.items())
        raise UserError(f"init_adapter teaches {told}: give concepts with the same words, n_tokens and order.")


def _adapted(start: Start) -> set[str]:
    """Names of the nets that the weights change."""
    if start.manifest.method != "full":
        return set(start.manifest.nets)
    tensors, _ = artifact.load_tensors(start.folder / artifact.ADAPTER)
    return {key.partition(".")[0] for key in tensors}


def _check_method(method: str, manifest: Manifest) -> None:
    """Raise UserError where `method` would leave a part of the weights out, or has no use for them."""
    full, lora, tokens = manifest.method == "full", bool(manifest.nets), bool(manifest.tokens)
    if "prefix" in (method, manifest.method) and method != manifest.method:
        raise UserError(
            f"init_adapter was made by method {manifest.method}, which method {method} cannot start from: use weights "
            "of the same method."
        )
    conditions, conditioned = (METHODS[name].draws_from_conditions for name in (method, manifest.method))
    # other programs' files do not say what they were trained for: there the user's word is taken
    if conditioned != conditions and (conditioned or manifest.base_hash):
        raise UserError(
            f"init_adapter was trained by method {manifest.method}, whose adapter acts on other tokens than that of "
            f"method {method}: use method {manifest.method}."
        )
    if conditions and (tokens or any(net.startswith("text_encoder") for net in manifest.nets)):
        raise UserError("init_adapter adapts the text encoder or has tokens, which method condition leaves alone.")
    if conditions and not lora:
        raise UserError(f"init_adapter holds nothing that method {method} trains: use the method that it was made by.")
    if method == "full" and not full:
        raise UserError(
            "init_adapter is an adapter and method full trains whole nets: merge it into the base model with "
            "python -m trainer.export --merge true, and give that as base_model."
        )
    if full and method != "full":
        raise UserError(
            f"init_adapter holds whole nets, which method {method} cannot start from: use method full, or make a LoRA "
            "of them with python -m trainer.export --extract true."
        )
    if (method == "lora" and not lora) or (method == "textual_inversion" and not tokens):
        raise UserError(f"init_adapter holds nothing that method {method} trains: use the method that it was made by.")
    if method == "lora" and tokens:
        raise UserError("init_adapter holds token embeddings too, which method lora would lose: use method pivotal.")
    if method == "textual_inversion" and lora:
        raise UserError("init_adapter holds a LoRA too, which textual_inversion would lose: use method pivotal.")
