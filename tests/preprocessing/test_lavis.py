"""The worker process: whatever it prints, dies of or hangs on, nobody waits for ever, no picture is mixed up."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from preprocessing.captioners.blip import BlipCaptioner, BlipSource
from preprocessing.captioners.lavis_client import PYTHON, SCRIPT, LavisCaptioner, LavisSource
from preprocessing.captioners.worker import JsonWorker, WorkerFailed
from preprocessing.errors import UserError

# A child that captions a picture by its top left pixel and does as that pixel's red asks.
FAKE = """
import base64, io, json, os, subprocess, sys, time
from PIL import Image
DIE, HANG, NOISE, SPOILT, FLOOD = 250, 251, 252, 253, 254
print("library chatter")
sys.stderr.write("loading\\n")
assert "PYTHONPATH" not in os.environ and "VIRTUAL_ENV" not in os.environ
if sys.argv[-1] == "broken":
    sys.exit("no model here")
if sys.argv[-1] == "mute":
    time.sleep(60)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    captions = []
    for packed in json.loads(line)["pictures"]:
        red, green, _ = Image.open(io.BytesIO(base64.b64decode(packed))).getpixel((0, 0))
        if red == DIE:
            sys.stderr.write("out of luck\\n")
            os._exit(7)
        if red == HANG:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            time.sleep(60)
        if red == NOISE:
            print("not json", "[1, 2]", "3", sep="\\n")
        if red == FLOOD:
            sys.stderr.write("x" * 2_000_000 + "\\n")
            print("y" * 2_000_000)
        captions.append({"error": "spoilt"} if red == SPOILT else {"caption": f"{red} {green}"})
    print(json.dumps({"captions": captions}), flush=True)
"""
DIE, HANG, NOISE, SPOILT, FLOOD = 250, 251, 252, 253, 254


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A captioner's source with the child above; its model is what it is asked to do at the start."""
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("VIRTUAL_ENV", "/nowhere")
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE), encoding="utf-8")
    return lambda model="fine", **changes: LavisSource(
        **{"python": Path(sys.executable), "model": model, "script": script, "start_timeout": 20, "timeout": 20}
        | changes
    )


def pictures(*reds: int) -> list[Image.Image]:
    return [Image.new("RGB", (2, 2), (red, number, 0)) for number, red in enumerate(reds)]


def captions(source: LavisSource, *reds: int, batch_size: int = 3) -> list[str | None]:
    captioner = LavisCaptioner(source)
    captioner.batch_size = batch_size
    try:
        return captioner.caption(pictures(*reds), lambda lines: None)
    finally:
        captioner.close()


def test_lines_come_back_in_order_whatever_the_child_prints(source):
    reds = [1, 2, NOISE, 4, FLOOD, 6, 7]
    assert captions(source(), *reds) == [f"{red} {number}" for number, red in enumerate(reds)]


def test_a_picture_that_cannot_be_read_costs_no_other_its_caption(source, capsys):
    assert captions(source(), 1, SPOILT, 3) == ["1 0", None, "3 2"]
    assert "spoilt" in capsys.readouterr().err


def test_a_picture_that_kills_the_child_is_left_out_and_the_others_are_asked_again(source, capsys):
    assert captions(source(), 1, DIE, 3, 4) == ["1 0", None, "3 2", "4 3"]
    told = capsys.readouterr().err
    assert "exit code 7" in told and "out of luck" in told


def test_a_picture_on_which_the_child_hangs_is_left_out_and_nothing_of_it_goes_on(source):
    started = time.monotonic()
    assert captions(source(timeout=1.0), 1, HANG, batch_size=2) == ["1 0", None]
    assert time.monotonic() - started < 20


def test_a_child_that_fails_on_every_picture_ends_the_job(source):
    with pytest.raises(UserError, match=r"failed on 3 pictures in a row.*out of luck.*use captioner blip"):
        captions(source(), DIE, DIE, DIE, DIE, batch_size=1)


@pytest.mark.parametrize(("model", "words"), [("broken", "no model here"), ("mute", "no answer in 1 s")])
def test_a_child_that_never_starts_is_told_with_its_last_words(source, model, words):
    with pytest.raises(UserError, match=f"{words}.*sh setup_lavis.sh"):
        captions(source(model, start_timeout=1.0 if model == "mute" else 20), 1)


def test_without_its_environment_the_command_that_makes_it_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no environment at .*gone: make it with `sh setup_lavis.sh`"):
        LavisCaptioner(LavisSource(python=tmp_path / "gone" / "bin" / "python"))


def test_the_child_ends_with_its_parent(source, tmp_path):
    chosen = source()
    worker = JsonWorker([chosen.python, chosen.script, "fine"], tmp_path, 20)
    pid = worker._process.pid
    os.kill(pid, 0)
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises((WorkerFailed, ValueError)):
        worker.ask({"pictures": []}, 1)


# For torch's CPU build, to which the torchvision of the package index does not belong; then the real worker.
WITH_NMS = """
import runpy, sys, torch
if not torch.version.cuda:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float threshold) -> Tensor")
runpy.run_path({script!r}, run_name="__main__")
"""
SPECIALS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 104: "a", 105: "picture", 106: "of"}
DEC, VOCABULARY = 30522, 30522  # LAVIS adds two tokens to the words of bert-base-uncased
SIDE = 32  # pixels
CONFIG = """
model:
  load_finetuned: True
  finetuned: {weights}
  vit_type: base
  image_size: 32
  med_config_path: {text}
  prompt: "a picture of "
preprocess: {{vis_processor: {{eval: {{name: blip_image_eval, image_size: 32}}}}}}
"""
TO_LAVIS = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.": "blocks.",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "post_layernorm": "norm",
}


def one_model_for_both(folder: Path) -> None:
    """A random BLIP as a transformers folder and as LAVIS's .yaml with its .pth; only LAVIS fixes the ViT's width."""
    import json

    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = [SPECIALS.get(number, f"w{number}") for number in range(VOCABULARY)]
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased/vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12}
    text = shape | {"vocab_size": VOCABULARY + 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    ids = {"bos_token_id": DEC, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 102}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=text | ids | {"encoder_hidden_size": 768, "layer_norm_eps": 1e-12, "projection_dim": 48},
        vision_config={"image_size": SIDE, "layer_norm_eps": 1e-6, "initializer_range": 0.05},
        image_text_hidden_size=48,
    )
    model = BlipForConditionalGeneration(config).eval()
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    pictures = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    BlipProcessor(pictures, tokenizer).save_pretrained(folder / "blip")
    model.save_pretrained(folder / "blip")
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("vision_model."):
            name = "visual_encoder." + name.removeprefix("vision_model.")
            for ours, theirs in TO_LAVIS.items():
                name = name.replace(ours, theirs)
        weights[name] = value
    torch.save({"model": weights}, folder / "lavis.pth")
    med = text | {"encoder_width": 768, "add_cross_attention": True, "add_type_embeddings": False, "pad_token_id": 0}
    (folder / "med.json").write_text(json.dumps(med | {"hidden_act": "gelu"}), encoding="utf-8")
    (folder / "lavis.yaml").write_text(
        CONFIG.format(weights=folder / "lavis.pth", text=folder / "med.json"), encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason="needs the environment that `sh setup_lavis.sh` makes")
@pytest.mark.filterwarnings("ignore")
def test_lavis_itself_says_what_blip_says(tmp_path):
    """The real package in its own environment against transformers with the same random weights."""
    import numpy as np

    one_model_for_both(tmp_path)
    script = tmp_path / "with_nms.py"
    script.write_text(WITH_NMS.format(script=str(SCRIPT)), encoding="utf-8")
    rng = np.random.default_rng(0)
    shapes = [(32, 32), (48, 80), (90, 40), (200, 300), (33, 31), (64, 64), (20, 20), (70, 70), (128, 32), (50, 51)]
    seen = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    lavis = LavisCaptioner(LavisSource(model=str(tmp_path / "lavis.yaml"), script=script, folder=tmp_path))
    try:
        said = lavis.caption(seen, lambda lines: None)
    finally:
        lavis.close()
    expected = BlipCaptioner(BlipSource(str(tmp_path / "blip"), "a picture of")).caption(seen, lambda lines: None)
    assert [" ".join(line.split()) for line in said] == expected
    assert len(set(said)) > 1 and all(said)
