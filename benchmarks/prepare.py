"""How long preparing a large set takes, and how much memory it holds at most, over all its processes.

    python -m benchmarks.prepare --pictures 10000 --side 640 --resolution 512

Makes that many JPEG photographs' worth of noise and shapes in a folder, prepares them without captions, and prints one
JSON line. The memory is the sum of the resident sets of this process and its workers, read ten times a second.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from preprocessing.prepare import prepare
from preprocessing.settings import PrepareSettings

MIB = 1024**2
DIFFERENT = 50  # pictures that are drawn; the others differ from one of them in their first pixels


class Watch(threading.Thread):
    """Reads the memory of this process and its children until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._ended = 0, threading.Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(0.1):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # it ended just now
            self.peak = max(self.peak, total)

    def stop(self) -> None:
        """End, the last reading done."""
        self._ended.set()
        self.join()


def make(folder: Path, count: int, side: int) -> None:
    """`count` JPEG files of varying shape, none equal to another."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DIFFERENT):
        height, width = rng.integers(side * 2 // 3, side * 4 // 3, 2)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        drawn.append(small.resize((int(width), int(height)), Image.Resampling.BICUBIC))
    for number in range(count):
        picture = drawn[number % DIFFERENT]
        picture.paste(tuple(number // 256**place % 256 for place in range(3)), (0, 0, 16, 16))
        picture.save(folder / f"{number:06d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=640, help="of the pictures, about, in pixels")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "data"
        source.mkdir()
        make(source, options.pictures, options.side)
        settings = PrepareSettings(
            input_images=source, resolution=options.resolution, captioner="none", workers=options.workers
        )
        seconds = {}
        watch = Watch()
        watch.start()
        for run in ("first", "unchanged"):
            started = time.monotonic()
            dataset = prepare(settings, 64, Path(scratch) / "prepared")
            seconds[run] = round(time.monotonic() - started, 1)
        watch.stop()
    print(
        json.dumps(
            {
                "pictures": options.pictures,
                "used": len({item.source for item in dataset.items}),
                "rejected": len(dataset.rejects),
                "peak_mib": round(watch.peak / MIB),
                "seconds": seconds,
                "cores": psutil.cpu_count(),
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
