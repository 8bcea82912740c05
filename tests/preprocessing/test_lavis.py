"""The worker process: whatever it prints, dies of or hangs on, nobody waits for ever, no picture is mixed up."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from preprocessing.captioners.lavis_client import LavisCaptioner, LavisSource
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
