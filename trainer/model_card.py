"""README.md of the weights: what they are, what they draw and how to use them; also the Hub's page for them.

Its YAML header is the Hub's: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer import artifact, families, hub, ui_files
from trainer.artifact import Manifest
from trainer.methods import METHODS
from trainer.report import Preview

# What the card tells of the settings; all of them are in config.yaml.
SHOWN = (
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "optimizer",
    "learning_rate",
    "text_embedding_lr",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "snr_gamma",
    "noise_offset",
    "caption_dropout",
    "preservation_weight",
    "ema_decay",
    "seed",
    "init_adapter",
)
ADAPTERS = {"lora": "a LoRA", "lokr": "a LoKr (Kronecker products)", "oft": "an OFT (rotations)"}
KINDS = {
    "textual_inversion": "textual-inversion",
    "full": "full-finetune",
    "pivotal": "lora",
    "lora": "lora",
    "prefix": "prompt-tuning",
}


@dataclass(frozen=True)
class Place:
    """Where the reader of a card has the files: a repository on the Hub, the job's output_dir, or else the unpacked
    archive.
    """

    repository: str | None
    files: frozenset[str]
    output_dir: Path | None = None

    @property
    def name(self) -> str:
        """The repository, or the folder: of the archive the one that the card says to unpack into."""
        return self.repository or str(self.output_dir or "trained_model")

    def path(self, file: str) -> str:
        """A Python expression for the path of one file."""
        if self.repository is None:
            return json.dumps(f"{self.name}/{file}")
        return f"hf_hub_download({json.dumps(self.repository)}, {json.dumps(file)})"

    def first(self, *names: str) -> str | None:
        """The first of these files that is there."""
        return next((name for name in names if name in self.files), None)


def write(path: Path, manifest: Manifest, previews: list[Preview], place: Place) -> None:
    """Write the card; the previews are samples/<name> beside it."""
    with artifact.written_whole(path) as temporary:
        temporary.write_text(text(manifest, previews, place), encoding="utf-8")


def text(manifest: Manifest, previews: list[Preview], place: Place) -> str:
    """The whole card."""
    family = families.family_class(manifest.base_model)
    header = yaml.safe_dump(_header(manifest, previews, place), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header}---",
        f"# {base_name(manifest) if _has_no_trigger(manifest) else manifest.title}",
        _what(manifest),
        _pictures(previews),
        f"## In {family.card_program}\n\n{_diffusers(manifest, place)}" if family.card_program else "",
        _comfyui(manifest, place),
        _atelier(manifest, place),
        _table("Scores", {name: f"{value:.4g}" for name, value in manifest.scores.items()}),
        _table("Settings", _settings(manifest)),
        f"## License\n\n{_license(manifest)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(manifest: Manifest, previews: list[Preview], place: Place) -> dict:
    family = families.family_class(manifest.base_model)
    adapter = artifact.adapter_type(manifest.nets)
    kind = "dora" if manifest.settings.get("use_dora") else KINDS.get(manifest.method, manifest.method)
    kind = adapter if kind == "lora" else kind
    header: dict = {"base_model": manifest.base_model} if _on_hub(manifest) else {}
    library = ["diffusers"] if family.card_program == "diffusers" else []
    stock = manifest.nets and adapter == "lora" and not METHODS[manifest.method].draws_from_conditions
    tags = ["text-to-image", *library, kind, *(["template:sd-lora"] if stock else []), *family.card_tags]
    header |= {
        "license": manifest.base_license or "unknown",
        **({"library_name": "diffusers"} if library else {}),
        "pipeline_tag": "text-to-image",
        "tags": tags,
        **({} if _has_no_trigger(manifest) else {"instance_prompt": manifest.title}),
        "widget": [{"text": one.prompt, "output": {"url": f"samples/{one.adapted.name}"}} for one in previews],
    }
    return header | family.card_header(manifest, place)


def _what(manifest: Manifest) -> str:
    adapter = ADAPTERS[artifact.adapter_type(manifest.nets)]
    what = {
        "pivotal": f"New token embeddings and {adapter}",
        "lora": adapter[0].upper() + adapter[1:],
        "textual_inversion": "New token embeddings",
        "full": "A full fine-tune",
        "prefix": "A prefix (vectors before the text encoder's input)",
        "perfusion": "New token embeddings and rank-one edits of cross-attention (Perfusion)",
        "condition": f"A LoRA on condition pictures ({', '.join(manifest.settings.get('condition_tasks', ()))})",
    }.get(manifest.method, f"Weights of method {manifest.method}")
    dora = " (DoRA)" if manifest.settings.get("use_dora") else ""
    several = "words are" if len(manifest.words) > 1 else "word is"
    words = ", and ".join(
        f"**{one.trigger_word}**" + (f", a {one.class_word}" if one.class_word else "") for one in manifest.words
    )
    start = manifest.started_from.get("init_adapter")
    return (
        f"{what}{dora} for {base_name(manifest)}, trained for {manifest.step} steps"
        + (f" from {Path(start).name}" if start else "")
        + ("." if _has_no_trigger(manifest) else f". The trigger {several} {words}.")
    )


def _has_no_trigger(manifest: Manifest) -> bool:
    """Whether captions alone say what is drawn."""
    return manifest.settings.get("mode") == "captions"


def base_name(manifest: Manifest) -> str:
    """The base model's name as others may read it: a toybox model's folder, a Hub id, or the last part of a path."""
    if manifest.base_model in families.TOYBOX_MODELS:
        return families.TOYBOX_MODELS[manifest.base_model].relative_to(families.TOYBOX.parent).as_posix()
    return manifest.base_model if _on_hub(manifest) else Path(manifest.base_model).name


def _on_hub(manifest: Manifest) -> bool:
    return manifest.base_model not in families.TOYBOX_MODELS and hub.is_repository(manifest.base_model)


def _pictures(previews: list[Preview]) -> str:
    if not previews:
        return ""
    rows = ["| prompt | seed | base model | with these weights |", "|---|---|---|---|"]
    for one in previews:
        base = f"![](samples/{one.base.name})" if one.base else ""
        rows.append(f"| {_cell(one.prompt)} | {one.seed} | {base} | ![](samples/{one.adapted.name}) |")
    return "\n".join(rows)


def _diffusers(manifest: Manifest, place: Place) -> str:
    if not METHODS[manifest.method].in_stock_pipelines:
        return "Diffusers has no place for these weights in its pipelines: Atelier draws with them, as below."
    if artifact.adapter_type(manifest.nets) != "lora":
        return (
            "Diffusers' loader knows LoRA alone: merge the weights into a model, or draw with them as below:\n\n"
            "```\npython -m trainer.export --weights trained_model.tar --out merged --merge true\n```"
        )
    if METHODS[manifest.method].draws_from_conditions:
        return (
            "The adapter acts on the tokens of condition pictures alone, which no stock pipeline computes: draw with "
            "it as below."
        )
    if manifest.method == "full" and families.INDEX not in place.files:
        return (
            "The weights are whole nets; this makes a folder that `DiffusionPipeline.from_pretrained` loads:\n\n"
            "```\npython -m trainer.export --weights trained_model.tar --out merged --merge true\n```"
        )
    here = place.output_dir is not None and manifest.base_model not in families.TOYBOX_MODELS
    base_model = manifest.base_model if here else base_name(manifest)
    code = families.family_class(manifest.base_model).how_to(manifest, base_model, place)
    unpacked = (
        ""
        if place.repository or place.output_dir
        else f"After `mkdir {place.name}; tar -xf trained_model.tar -C {place.name}`, and so for what follows:\n\n"
    )
    return f"{unpacked}```python\n{code.rstrip()}\n```"


def _comfyui(manifest: Manifest, place: Place) -> str:
    lines = []
    lora = f"{ui_files.FOLDER}/{ui_files.LORA}.safetensors"
    bundled = f"{ui_files.FOLDER}/{ui_files.BUNDLED}.safetensors"
    if lora in place.files:
        lines.append(f"- `{lora}` goes into ComfyUI's `models/loras` (A1111: `models/Lora`).")
    names = ui_files.embedding_names(manifest).values()
    for name in names:
        embedding = f"{ui_files.FOLDER}/{ui_files.EMBEDDING_FOLDER}/{name}.safetensors"
        if embedding in place.files:
            lines.append(
                f"- `{embedding}` goes into `models/embeddings` (A1111: `embeddings`). The prompt says "
                f"`embedding:{name}` in ComfyUI, `{name}` in A1111."
            )
    if bundled in place.files:
        brought = f"the word{'s' if len(names) > 1 else ''} {', '.join(f'`{name}`' for name in names)}"
        lines.append(f"- `{bundled}` holds both for A1111: as a LoRA it brings {brought} with it.")
    return "## In ComfyUI and A1111\n\n" + "\n".join(lines) if lines else ""


def _atelier(manifest: Manifest, place: Place) -> str:
    weights = place.repository or "trained_model.tar"
    shown = METHODS[manifest.method].draws_from_conditions
    conditions = [f"picture_{i + 1}.png" for i, _ in enumerate(manifest.settings["condition_tasks"])] if shown else []
    more = f" --condition {' '.join(conditions)}" if conditions else ""
    subject = "a cat" if _has_no_trigger(manifest) else manifest.title
    return f'## In Atelier\n\n```\npython predict.py --weights {weights} --prompt "a photo of {subject}"{more}\n```'


def _settings(manifest: Manifest) -> dict[str, str]:
    shown = {name: manifest.settings.get(name) for name in SHOWN if manifest.settings.get(name) is not None}
    if "init_adapter" in shown:  # of a path the name alone: where it lay is nobody's business
        shown["init_adapter"] = Path(str(shown["init_adapter"])).name
    return {"method": manifest.method} | {name: str(value) for name, value in shown.items()}


def _license(manifest: Manifest) -> str:
    base = base_name(manifest)
    if not manifest.base_license:
        return f"The license of the base model, {base}, is not known here: look it up before you pass these weights on."
    return f"That of the base model: {base} is under {manifest.base_license}."


def _table(title: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| `{name}` | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| name | value |", "|---|---|", *lines])


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
