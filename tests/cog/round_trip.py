"""Trains and draws through both servers, with the embedded base model, and prints what it took.

    python -m tests.cog.round_trip FOLDER

`tests/cog/clean_root.sh` runs it inside a clean root. Exits with an error if anything is not as it should be.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.cog import service

ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path) -> None:
    work = service.checkout(ROOT, folder)
    pictures = service.data_url((ROOT / "recipes" / "demo.zip").read_bytes(), "application/zip")
    started = time.monotonic()
    with service.running("train", work) as server:
        result = server.run({"input_images": pictures, "max_train_steps": 20, "config": "report_to: none"})
    assert result["status"] == "succeeded", result
    archive = service.content(result["output"])
    print(f"trained: {result['metrics']}, {len(archive)} bytes, {time.monotonic() - started:.0f} s with the start")
    started = time.monotonic()
    with service.running("predict", work) as server:
        result = server.run(
            {
                "prompt": "a big TOK on the left",
                "seed": 1,
                "replicate_weights": service.data_url(archive, "application/x-tar"),
            }
        )
    assert result["status"] == "succeeded", result
    (picture,) = (service.content(url) for url in result["output"])
    assert picture.startswith(b"\x89PNG"), picture[:20]
    (work / "drawn.png").write_bytes(picture)
    print(f"drawn: {len(picture)} bytes, {time.monotonic() - started:.0f} s with the start; {result['logs']!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
