"""Whether a model's folder can be loaded, told from its small files and the headers of its weights.

No model loads for it. What is not found here is found when the model loads: see `LOADING_ERRORS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open

from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, read_object

# What diffusers, transformers and torch end with when a folder's settings or weights are damaged, or do not fit.
LOADING_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)

# What a folder needs: of each group, one.
Needs = Sequence[Sequence[str]]
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model")
MODEL_NEEDS: Needs = (("config.json",), WEIGHTS)
CLIP_NEEDS: Needs = (*MODEL_NEEDS, ("preprocessor_config.json", "processor_config.json"), TOKENIZER)
PART_NEEDS: dict[str, Needs] = {  # of the folder of a pipeline, by the first word of the part's name
    "transformer": MODEL_NEEDS,
    "vae": MODEL_NEEDS,
    "text": MODEL_NEEDS,
    "tokenizer": (TOKENIZER, ("tokenizer_config.json",)),
    "scheduler": (("scheduler_config.json",),),
}

SETTINGS = {  # files that are JSON objects, with a key that they cannot do without
    "model_index.json": "_class_name",
    "scheduler_config.json": "",
    "config.json": "",
    "preprocessor_config.json": "",
    "processor_config.json": "",
    "tokenizer_config.json": "",
    "special_tokens_map.json": "",
    "vocab.json": "",
    "tokenizer.json": "added_tokens",
}


def small(needs: Needs) -> list[str]:
    """The files among them that are fetched before a model of the hub loads: those that have one name."""
    return [names[0] for names in needs if len(names) == 1]


def check_files(folder: Path, subject: str, needs: Needs) -> None:
    """ConfigError, beginning with `subject`, if a file that is needed is not there, or one that is there is damaged."""
    for names in needs:
        if not any(any(folder.glob(name)) for name in names):
            raise ConfigError(f"{subject}{folder} has no {' or '.join(names)}.")
    for name, key in SETTINGS.items():
        if os.path.exists(folder / name) and key not in {"", *read_object(folder / name, subject)}:
            raise ConfigError(f'{subject}{folder / name} has no "{key}".')
    for path in sorted(folder.glob("*.safetensors")):
        _check_header(path, subject)


def first_line(error: BaseException) -> str:
    """What a library says of the first thing that is wrong."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_header(path: Path, subject: str) -> None:
    """The file's list of tensors can be read, and they fill the file."""
    open_regular(path, subject).close()
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{subject}{path} is damaged ({first_line(error)}).") from None
