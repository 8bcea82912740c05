"""Settings that come as one text, and messages that go to strangers."""

from __future__ import annotations

import base64
import json
import urllib.parse
from pathlib import Path

import pytest
import yaml

from preprocessing.errors import LONGEST_MESSAGE, UserError, redacted, short
from trainer import hosted
from trainer.config import JobSettings

OUTPUTS = Path("outputs")
GIVEN = {"input_images": Path("a.zip")}


def settings(config: str | None, **inputs: object) -> JobSettings:
    return hosted.job_settings(GIVEN | inputs, config, OUTPUTS, "fresh")


def data_url(text: str) -> str:
    return "data:text/yaml;base64," + base64.b64encode(text.encode()).decode()


EXPECTED = JobSettings(
    input_images="a.zip", lora_alpha=2.5, snr_gamma=None, preview_seeds=(1, 2), output_dir="outputs/x"
)
VALUES = {"lora_alpha": 2.5, "snr_gamma": None, "preview_seeds": [1, 2], "output_dir": "outputs/x"}


def test_config_in_every_form(tmp_path: Path) -> None:
    text = yaml.safe_dump(VALUES)
    path = tmp_path / "my settings.yaml"
    path.write_text(text, encoding="utf-8")
    plain = "data:text/plain," + urllib.parse.quote(text)
    for config in (text, json.dumps(VALUES), json.dumps(VALUES, indent=2), data_url(text), plain, f"{path}\n"):
        assert settings(config) == EXPECTED


def test_every_setting_of_a_result_is_a_config() -> None:
    earlier = EXPECTED.model_copy(update={"mixed_precision": "no", "input_images": Path("gone.zip")})
    text = yaml.safe_dump(earlier.model_dump(mode="json"))
    again = settings(text)
    assert again == earlier.model_copy(update={"input_images": Path("a.zip")})  # the pictures are those of the input


def test_an_input_at_its_default_does_not_override() -> None:
    assert settings("seed: 3\nuse_dora: true", seed=0, use_dora=False).seed == 3
    assert settings("seed: 3", seed=4).seed == 4
    assert settings(None) == settings("") == settings("# nothing")
    assert settings(None).output_dir == OUTPUTS / "fresh"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("max_train_stpes: 5", "config: max_train_stpes is no setting; did you mean max_train_steps?"),
        ("seed: x", "config: seed should be a valid integer"),
        ("just words", "name: value"),
        ("[1, 2]", "name: value"),
        ("nowhere.yaml", "name: value"),
        ("seed: 1\nseed: 2", "config, line 2: seed is given twice"),
        ("{" * 3000, "config"),
        ("data:text/yaml;base64,%%%", "base64"),
        ("data:text/yaml;base64,AAA", "base64"),
        ("data:nothing", "no comma"),
        (data_url("sede: 1"), "sede is no setting"),
        ("data:,%ff%fe%00", "config"),
        ("a: " + "x" * 2**20, "larger than 1 MiB"),
        ("use_dora: true\nmethod: full", "use_dora goes with"),
        ("styl: bold", "styl is no setting"),
        ("output_dir: /etc/mine", "not inside outputs"),
        ("output_dir: outputs/../../mine", "not inside outputs"),
        ("output_dir: outputs", "not inside outputs"),
        ("output_dir: .", "not inside outputs"),
    ],
)
def test_mistakes_in_config(config: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        settings(config)
    assert told in str(error.value) and len(str(error.value)) < LONGEST_MESSAGE


def test_a_link_leads_out_of_the_folder_no_more_than_dots(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not inside"):
        hosted.job_settings(GIVEN, f"output_dir: {tmp_path}/outputs/link/x", tmp_path / "outputs", "fresh")


def test_an_input_is_named_by_itself_and_not_by_config() -> None:
    with pytest.raises(UserError, match=r"^lora_rank should be"):
        settings("lora_rank: 4", lora_rank=0)


SECRETS = [
    ("https://me:pw@127.0.0.1:80/a.tar?token=abc#x cannot be read", "https://127.0.0.1:80/a.tar cannot be read"),
    ("Max retries exceeded with url: /x.zip?a=1&b=2 (Caused by", "Max retries exceeded with url: /x.zip (Caused by"),
    ("'http://h/p?X-Sig=a%2Fb' and \"http://u@h/\"", "'http://h/p' and \"http://h/\""),
    ("it is data:application/zip;base64,UEsDBA==, sorry", "it is data:... sorry"),
    ("hf_abcdefghijklmnopqrstuv is wrong", "*** is wrong"),
    ("Authorization: Bearer abcdef.ghi", "Authorization: ***"),
    ("did you mean max_train_steps?", "did you mean max_train_steps?"),
    ("is it a: or b? c = d", "is it a: or b? c = d"),
]


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_secrets_are_taken_out(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_a_message_is_one_short_line() -> None:
    assert short("two\nlines\t end ") == "two lines end"
    assert short("x" * LONGEST_MESSAGE) == "x" * LONGEST_MESSAGE
    long = short("word " * 10**6)
    assert len(long) <= LONGEST_MESSAGE and long.endswith("wo...")
