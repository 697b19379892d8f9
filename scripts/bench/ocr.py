"""How well the reward `ocr` reads: 100 words, drawn plainly and turned by 10 degrees.

    python scripts/bench/ocr.py

Each is drawn once, in one of four sizes and four pairs of colours, in the middle of 256 x 256 pixels, in the font that
Pillow brings. A word counts as read if it gets a reward of 1; the mean reward counts single letters too. It writes
results.json and table.md into assets/figures/ocr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # scripts import one another; no install offers them

OUT = ROOT / "assets/figures/ocr"
SIDE = 256  # pixels
SIZES = (24, 32, 40, 48)  # of letters, in pixels
COLOURS = (("black", "white"), ("white", "navy"), ("darkred", "beige"), ("yellow", "black"))  # letters, ground
TURNS = (0, 10)  # degrees
TEXT = """
apple bread chair dream eagle flame grape house island jungle knife lemon music night ocean piano queen river
stone table under voice water yellow zebra Berlin Paris London Tokyo Cairo Lima Oslo Rome Delhi Quito OPEN
CLOSED SALE STOP EXIT HOTEL CAFE TAXI BANK PARK 2024 1984 42 365 7000 Hello World Thanks Sorry Please Welcome
Goodbye Morning Evening Friend winter summer autumn spring monday friday coffee butter cheese garden window
mirror bottle pencil basket candle guitar violin rocket planet galaxy comet forest desert valley mountain
bridge castle tower market station school library theatre museum clock paper smile candy tiger
"""
WORDS = TEXT.split()


def draw(word: str, turn: float = 0, size: int = 32, colours: Sequence[str] = COLOURS[0]) -> Image.Image:
    """A word in the middle of a plain picture, turned by so many degrees."""
    ink, ground = colours
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), word, ink, font, anchor="mm")
    return picture.rotate(turn, Image.Resampling.BICUBIC, fillcolor=ground)


def measure(turn: float) -> dict[str, Any]:
    """All words at one angle: how many are read, the mean reward, and seconds of this thread an image."""
    from torchvision.transforms.functional import to_tensor

    from flow_grpo.rewards.ocr import Ocr

    ocr, rewards, seconds = Ocr(), [], []
    for number, word in enumerate(WORDS):
        picture = draw(word, turn, SIZES[number % 4], COLOURS[number // 4 % 4])
        start = time.process_time()
        rewards.append(ocr(to_tensor(picture)[None], [f'a sign "{word}"'], [{}]).item())
        seconds.append(time.process_time() - start)
    return {
        "turn": turn, "words": len(WORDS), "read": rewards.count(1.0), "reward": statistics.mean(rewards),
        "seconds": statistics.median(seconds), "missed": [w for w, r in zip(WORDS, rewards, strict=True) if r < 1],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| turned by | words | read | mean reward | CPU seconds an image |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['turn']}° | {row['words']} | {row['read']} | {row['reward']:.3f} | {row['seconds']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read all words, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    out = parser.parse_args().out
    from flow_grpo.files import strict_json, write_atomically
    from scripts.bench.machine import cpu_model

    rows = [measure(turn) for turn in TURNS]
    out.mkdir(parents=True, exist_ok=True)
    results = {"cpu": cpu_model(), "command": "python scripts/bench/ocr.py", "rows": rows}
    write_atomically(out / "results.json", strict_json(results, indent=1) + "\n")
    write_atomically(out / "table.md", table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
