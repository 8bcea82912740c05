"""LoRA against prompt training, measured: `python -m benchmarks.prefix --out results.json [--model toybox/sd ...]`

For each base model and method the real job trains on twelve pictures of a sprite, in a process of its own, on one
thread. Told are what is trained and stored, the processor's seconds of a step (which others on the machine hardly
change), the most memory that training took beyond what was there before its first step, and of the toybox's models how
the weights draw. The small OmniGen2 has random weights, in about the published proportion of language model to
denoiser: of it there is nothing to draw. A result that `--out` holds is kept. `--costs` stops after a few steps and
leaves the drawing out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.judging import SubjectJudge
from benchmarks.runs import FEW, ROOT, run_missing, trained_numbers, weight_files
from benchmarks.step import MIB, Clock, machine
from trainer import commandline

SPRITE = ROOT / "toybox" / "sprites" / "robot.png"
OMNIGEN2 = "small omnigen2"
MODELS = ("toybox/sd", "toybox/flux", OMNIGEN2)
NOTHING = "nothing"  # no method: what the base model draws
METHODS = ("pivotal", "lora", "prefix")
OMNIGEN2_METHODS = ("lora", "prefix", "lora, checkpointed", "prefix, checkpointed")
SCORES = ("subject", "likeness", "background", "position")


class Watch(Clock):
    """Notes the processor's time at the end of each step, and the process's memory: before the first step, and the most
    since then, in MiB.

    The kernel's own count of the most can be reset on Linux alone; elsewhere both stay None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: float | None = None
        self.most: float | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "train" and done:
            self.ends.append(time.process_time())
        status = Path("/proc/self/status")
        if stage != "train" or not status.exists():
            return
        if not done:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _mib(status, "VmRSS")
        self.most = _mib(status, "VmHWM")


def _mib(status: Path, field: str) -> float:
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(kib) * 1024 / MIB


def save_small_omnigen2(folder: Path) -> None:
    """An OmniGen2 of 54 M parameters (denoiser 29.8 M, language model 24.7 M) with random weights: heads of 120 numbers
    as the published one, a tokenizer of bytes, a VAE of 8 pixels a latent.
    """
    import torch
    from diffusers import AutoencoderKL
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    from trainer.families import INDEX, RECOMMENDED
    from trainer.families.omnigen2.transformer import OmniGen2Transformer2DModel

    torch.manual_seed(0)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder / "processor")
    OmniGen2Transformer2DModel(
        hidden_size=360,
        num_layers=6,
        num_attention_heads=3,
        num_kv_heads=1,
        axes_dim_rope=(40, 40, 40),
        text_feat_dim=384,
        timestep_scale=1000.0,
    ).save_pretrained(folder / "transformer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 384, "intermediate_size": 2048, "num_hidden_layers": 9}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [12, 18, 18], "rope_theta": 1e6}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 384}
    mllm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    mllm.save_pretrained(folder / "mllm")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        latent_channels=16,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(folder / "vae")
    (folder / INDEX).write_text('{"_class_name": "OmniGen2Pipeline"}', encoding="utf-8")
    # its pictures are noise, and are drawn because every job draws
    drawing = {"num_inference_steps": 1, "guidance_scale": 1.0, "unrelated_prompts": ["a dog"]}
    (folder / RECOMMENDED).write_text(json.dumps({"draw": drawing}), encoding="utf-8")


def settings_of(model: str, method: str, folder: Path, costs: bool) -> dict[str, Any]:
    """The job's settings, but for its pictures; the small OmniGen2 is made for it."""
    name, _, checkpointed = method.partition(", ")
    chosen = {"input_images": folder / "data.zip", "output_dir": folder / "out", "base_model": model}
    chosen |= {"method": name, "holdout": 0, "evaluate_every": 10**6, "report_to": "none", "workers": 0}
    drawn = {"preview_prompts": ("TOK",), "preview_seeds": (0,)}
    if model != OMNIGEN2:
        return chosen | ({"max_train_steps": FEW} | drawn if costs else {})
    save_small_omnigen2(folder / "model")
    few = {"max_train_steps": FEW, "train_batch_size": 2, "resolution": 256, "captioner": "none"}
    few |= {"learning_rate": 1e-3, "small_pictures": "upscale"}
    return chosen | few | drawn | {"base_model": str(folder / "model"), "gradient_checkpointing": bool(checkpointed)}


def measure(model: str, method: str, costs: bool, sprite: Path) -> dict[str, Any]:
    """One job."""
    if method == NOTHING:
        judge = SubjectJudge(sprite, model)
        return {"scores": judge.scores(judge.draw())}
    from toybox import concept
    from trainer import job
    from trainer.config import JobSettings

    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="prefix-") as name:
        folder = Path(name)
        concept.main(["--sprite", str(sprite), "--out", str(folder / "data.zip")])
        settings = job.fill(JobSettings(**settings_of(model, method, folder, costs)))
        result = job.train(settings, progress=watch)
        measured = {
            "parameters": trained_numbers(folder / "out"),
            "stored_bytes": sum(path.stat().st_size for path in weight_files(folder / "out")),
            "seconds_per_step": watch.step_seconds(),
            "memory_mib": None if watch.most is None else watch.most - watch.before,
            "gain": result.summary.curve[-1].gain.mean,
            "steps": settings.max_train_steps,
            "train_batch_size": settings.train_batch_size,
            "learning_rate": settings.learning_rate,
            "machine": machine(),
        }
        return measured | ({} if costs else {"scores": SubjectJudge(sprite, model).adapter_scores(result.archive)})


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| base model | method | trained parameters | stored | step (CPU) | memory | gain | subject | likeness "
        "| background | position | drift |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    forms: dict[str, Callable[[Any], str]] = {
        "parameters": "{:,}".format,
        "stored_bytes": lambda size: f"{size / 1000:,.0f} kB",
        "seconds_per_step": "{:.2f} s".format,
        "memory_mib": "{:.0f} MiB".format,
        "gain": lambda share: f"{100 * share:.1f} %",
        **dict.fromkeys(SCORES, "{:.2f}".format),
        "drift": "{:.3f}".format,
    }
    for key, one in results.items():
        told = one | one.get("scores", {})
        if "scores" not in one:
            told["gain"] = None  # of a few steps it says nothing
        cells = ["" if told.get(name) is None else form(told[name]) for name, form in forms.items()]
        model, *method = key.split("|")
        lines.append(f"| {' | '.join([model, ', '.join(method), *cells])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["toybox/sd", OMNIGEN2])
    parser.add_argument("--sprite", type=Path, default=SPRITE, help="an RGBA drawing (default: the robot)")
    parser.add_argument("--costs", action="store_true", help="few steps, and nothing is drawn and scored")
    args = parser.parse_args(argv)
    of_sprite = "" if args.sprite == SPRITE else f"|{args.sprite.stem}"
    given: dict[str, tuple[Any, ...]] = {}
    for model in args.model:
        drawn = METHODS if args.costs else (NOTHING, *METHODS)
        for method in OMNIGEN2_METHODS if model == OMNIGEN2 else drawn:
            key = f"{model}|{method}" + ("|costs" if args.costs and model != OMNIGEN2 else "") + of_sprite
            given[key] = (model, method, args.costs or model == OMNIGEN2, args.sprite.resolve())
    results = run_missing(args.out, measure, given, jobs=1, apart=True)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
