"""Fetch training and test prompts: the distinct captions of a dataset, shuffled, in two disjoint .txt files.

  fme prompts --dataset yuvalkirstain/pickapic_v1_no_images --column caption --out assets/prompts/pickscore

The dataset is a hub id, or a .csv, .json, .jsonl or .parquet file. Only the text is read, row by row.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import write_atomically
from flow_grpo.rules import text_fault

FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `fme prompts`."""
    parser.add_argument("--dataset", required=True, help="hub id, or a .csv, .json, .jsonl or .parquet file")
    parser.add_argument("--column", default="caption", help="the column that holds the prompts")
    parser.add_argument("--out", required=True, help="folder for train.txt and test.txt")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--num-train", type=int, default=0, help="training prompts; 0: all that are not for testing")
    parser.add_argument("--num-test", type=int, default=2048, help="test prompts")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle")


def main(arguments: argparse.Namespace) -> int:
    """Read, split, write; 0. Raises ConfigError as the parts do."""
    prompts = usable(distinct(read_captions(arguments.dataset, arguments.column, arguments.split)))
    train, test = divide(prompts, arguments.num_train, arguments.num_test, arguments.seed)
    for name, part in (("train", train), ("test", test)):
        path = Path(arguments.out) / f"{name}.txt"
        write_lines(path, part)
        print(f"{path}: {len(part)} prompts")
    return 0


def read_captions(dataset: str, column: str, split: str) -> Iterator[str | None]:
    """The values of a column, in the dataset's order.

    Raises ConfigError if there is no such file, dataset, split or text column, or the hub cannot be reached.
    """
    kind = FILE_KINDS.get(Path(dataset).suffix)
    if kind and not Path(dataset).is_file():
        raise ConfigError(f"--dataset {dataset} does not exist; give a file or a hub id.")
    from datasets import load_dataset  # imported late, for a quick --help and quick mistakes
    from tqdm import tqdm

    try:
        if kind:
            rows = load_dataset(kind, data_files=dataset, split="train", streaming=True)
        else:
            rows = load_dataset(dataset, split=split, streaming=True)
        for row in tqdm(rows, desc="reading", unit=" rows"):  # streamed: most reading happens here
            yield _caption(row, column, dataset)
    except ConfigError:
        raise
    except StopIteration:
        raise ConfigError(f"--dataset {dataset} cannot be read: it has no row.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset {dataset} (split {split}) cannot be read: {error}") from None


def _caption(row: Mapping[str, Any], column: str, dataset: str) -> str | None:
    """The value of the column; ConfigError if there is none, or it is no text."""
    if column not in row:
        raise ConfigError(f"--column {column} is not in {dataset}; there are {', '.join(sorted(row))}.")
    if not isinstance(row[column], str | None):
        raise ConfigError(f"--column {column} of {dataset} is not text but {row[column]!r:.80}.")
    return row[column]


def distinct(captions: Iterable[str | None]) -> list[str]:
    """Each caption once, in order of appearance, its white space made single blanks; empty ones dropped."""
    normalised = (" ".join(caption.split()) for caption in captions if caption)
    return [prompt for prompt in dict.fromkeys(normalised) if prompt]


def divide(prompts: Sequence[str], num_train: int, num_test: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle, then take `num_test` for testing and `num_train` others (0: all others) for training."""
    if min(num_train, num_test) < 0:
        raise ConfigError(f"--num-train {num_train} and --num-test {num_test} take whole numbers of at least 0.")
    needed = num_test + max(num_train, 1)
    if len(prompts) < needed:
        raise ConfigError(
            f"--num-train {num_train} and --num-test {num_test} need {needed} distinct prompts, "
            f"but the dataset has {len(prompts)}; ask for fewer."
        )
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    rest = shuffled[num_test:]
    return rest[: num_train or len(rest)], shuffled[:num_test]


def usable(prompts: Sequence[str]) -> list[str]:
    """Those that a prompt file can hold; the others are counted on the screen."""
    faults = [fault for prompt in prompts if (fault := text_fault(prompt))]
    if faults:
        print(f"left out: {len(faults)} captions that no prompt file can hold, the first of which {faults[0]}")
    return [prompt for prompt in prompts if not text_fault(prompt)]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file all at once or not at all; ConfigError where none can be written."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error.strerror}).") from None
