"""The scales' own parts; what they measure is the job's and the oracle's."""

from __future__ import annotations

import pytest

from benchmarks import scales
from trainer.drawing import DrawSettings


def test_every_pair_of_strengths_can_be_asked_for_and_none_twice() -> None:
    pairs = [(lora, scales.TOKENS[tokens](lora)) for lora, tokens in scales.asked()]
    assert len(set(pairs)) == len(pairs) == 13
    for lora, tokens in pairs:
        DrawSettings(prompt="TOK", lora_scale=lora, token_scale=tokens)


def test_the_table_has_the_mean_over_the_runs_of_each_pair() -> None:
    def rows(subject: float) -> scales.Rows:
        still = dict.fromkeys(scales.COLUMNS, 0.5)
        return {f"{lora}/{tokens}": still | {"subject": subject * lora} for lora, tokens in scales.asked()}

    lines = scales.table({"robot/0": rows(0.2), "snail/0": rows(0.6)}).splitlines()
    assert lines[2] == "| 0.25 | as drawing chooses | 0.100 | 0.500 | 0.500 | 0.500 | 0.500 |"
    assert len(lines) == 2 + 13 and lines[-1].startswith("| 1.25 | lora_scale | 0.500 |")


def test_the_runs_must_be_kept_somewhere() -> None:
    with pytest.raises(SystemExit) as error:
        scales.main(["--sprite", "x.png"])
    assert error.value.code == 2
