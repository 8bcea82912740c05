"""Each format that `trainer.export` writes: a function that writes it into a folder and gives back the files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer import artifact, ui_files
from trainer.families.base import Family
from trainer.weights import Weights

ARCHIVE = "trained_model.tar"
DIFFUSERS_EMBEDDINGS = "learned_embeds.safetensors"  # where diffusers' load_textual_inversion looks
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

Writer = Callable[[Path, Family, Weights], list[Path]]


def write_kohya(out: Path, family: Family, weights: Weights) -> list[Path]:
    """comfyui/: LoRA, embeddings and both in one (see trainer.ui_files)."""
    folder = out / ui_files.FOLDER
    ui_files.write(folder, family, weights.manifest, weights.tensors, weights.rows)
    return sorted(folder.rglob("*.safetensors"))


def write_diffusers(out: Path, family: Family, weights: Weights) -> list[Path]:
    """The files that `load_lora_weights(out)` and `load_textual_inversion(out)` find.

    Of one text encoder the embeddings are under the trigger word, by which the loader calls them; in small letters,
    for CLIP's tokenizer makes them so, and the pipeline then finds no others. Of two they are by encoder (clip_l,
    clip_g), and are loaded one at a time. Several trigger words have a file each, learned_embeds_TOK.safetensors.
    Nothing of adapters other than LoRA, which that loader does not know.
    """
    if artifact.adapter_type(weights.manifest.nets) != "lora":
        return []
    files = {artifact.LORA_FILE: weights.tensors} if weights.tensors else {}
    names = ui_files.embedding_names(weights.manifest)
    for trigger, rows in ui_files.rows_by_trigger(weights.rows, weights.manifest) if weights.rows else ():
        file = DIFFUSERS_EMBEDDINGS
        if len(names) > 1:
            file = f"{Path(file).stem}_{names[trigger]}{Path(file).suffix}"
        files[file] = {trigger.lower(): next(iter(rows.values()))} if len(rows) == 1 else rows
    for name, tensors in files.items():
        artifact.save_tensors(out / name, tensors, artifact.adapter_header(tensors, weights.manifest))
    return [out / name for name in files]


def write_peft(out: Path, family: Family, weights: Weights) -> list[Path]:
    """peft/<net>/: adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
    written = []
    for net, config in weights.manifest.nets.items():
        folder = out / "peft" / net
        folder.mkdir(parents=True)
        start = f"{net}."
        own = {key.removeprefix(start): value for key, value in weights.tensors.items() if key.startswith(start)}
        artifact.save_tensors(folder / PEFT_WEIGHTS, {f"base_model.model.{key}": own[key] for key in own})
        text = json.dumps(config | {"base_model_name_or_path": weights.manifest.base_model}, indent=2, sort_keys=True)
        (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
        written += [folder / PEFT_WEIGHTS, folder / PEFT_CONFIG]
    return written


def write_archive(out: Path, family: Family, weights: Weights) -> list[Path]:
    """trained_model.tar, for `predict.py` and for init_adapter, with comfyui/ in it."""
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        weights.write(Path(folder))
        write_kohya(Path(folder), family, weights)
        artifact.write(Path(folder), out / ARCHIVE)
    return [out / ARCHIVE]


WRITERS: dict[str, Writer] = {
    "kohya": write_kohya,
    "diffusers": write_diffusers,
    "peft": write_peft,
    "archive": write_archive,
}
