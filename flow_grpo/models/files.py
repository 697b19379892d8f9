"""Whether a model can be loaded: a folder, told from its small files and the headers of its weights, or one of the hub.

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

HUB_SECONDS = 10.0  # to wait for an answer
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


def check_on_hub(model: str, file: str, revision: str = "", subject: str = "") -> None:
    """What is no folder is on the hub, or in its cache: ask once for a small file that every such model has.

    Raises:
        ConfigError: it is not, or the hub does not answer; `subject` begins the sentence.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache  # models are mostly folders

    try:
        if not isinstance(try_to_load_from_cache(model, file, revision=revision or None), str):
            get_hf_file_metadata(hf_hub_url(model, file, revision=revision or None), timeout=HUB_SECONDS)
    except Exception as error:  # also those of the HTTP library below
        raise ConfigError(
            f"{subject}{model!r} is no folder here, and cannot be fetched from the hub: {first_line(error)}"
        ) from error


def _check_header(path: Path, subject: str) -> None:
    """The file's list of tensors can be read, and they fill the file."""
    open_regular(path, subject).close()
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{subject}{path} is damaged ({first_line(error)}).") from None
