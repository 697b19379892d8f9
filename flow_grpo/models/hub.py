"""Models of the hub: which of their files are in its cache, and the small ones fetched before anything large is.

Small files are settings, JSON of a few kilobytes; weights and vocabularies are fetched by the libraries that load them.
Several processes may fetch at once: the hub's cache locks its files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.models.files import WEIGHTS, first_line
from flow_grpo.paths import find

INDEX = "model_index.json"  # of a pipeline
SETTINGS = "config.json"  # of another model
SECONDS = 10.0  # to wait for an answer
AT_ONCE = 8  # files


def folder_of(model: str, revision: str = "", file: str = INDEX) -> Path | None:
    """Where the files of a model are: its own folder, or, of a hub id, that of the cache which has this file; or None.

    Args:
        revision: branch, tag or commit of a hub id; empty: its default branch.
    """
    from huggingface_hub import try_to_load_from_cache  # models are mostly folders

    found = find(model)
    if os.path.isdir(found):
        return Path(found)
    try:
        cached = try_to_load_from_cache(model, file, revision=revision or None)
    except (OSError, ValueError):  # no name that the hub or the disk could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def has_weights(folder: Path) -> bool:
    """Whether a model's weights lie in a folder, every shard of them."""
    maps = [read_object(index).get("weight_map", {}) for index in folder.glob("*.index.json")]
    shards = {str(file) for weights in maps for file in weights.values()}
    return any(any(folder.glob(name)) for name in WEIGHTS) and all((folder / shard).is_file() for shard in shards)


def fetch(subject: str, model: str, revision: str = "", file: str = INDEX) -> Path:
    """The folder of the cache with this file of a hub id, fetched as the hub has it now.

    Raises:
        ConfigError: the hub does not answer, or has no such model, revision or file; `subject` begins the sentence.
    """
    from huggingface_hub import hf_hub_download

    ask(subject, model, revision, file)  # a download without an answer is tried again for minutes
    with _told(subject, model, revision, file):
        return Path(hf_hub_download(model, file, revision=revision or None, etag_timeout=SECONDS)).parent


def ask(subject: str, model: str, revision: str, file: str) -> None:
    """Whether the hub has this file of a model; it is not fetched.

    Raises:
        ConfigError: as `fetch`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _told(subject, model, revision, file):
        get_hf_file_metadata(hf_hub_url(model, file, revision=revision or None), timeout=SECONDS)


def fetch_more(subject: str, model: str, folder: Path, files: Iterable[str]) -> None:
    """Fetch more files into a folder of the cache, of the same commit; those that the hub lacks are left out.

    Raises:
        ConfigError: as `fetch`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def fetch_one(file: str) -> None:
        with _told(subject, model, folder.name, file):
            try:
                hf_hub_download(model, file, revision=folder.name, etag_timeout=SECONDS)
            except RemoteEntryNotFoundError:
                return  # whoever needs it says so

    missing = [file for file in files if not (folder / file).is_file()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch_one, missing))


def require(subject: str, model: str, file: str = SETTINGS) -> None:
    """Of a model that is no pipeline, nor a folder, nor in the cache with its weights: fetch its settings.

    Args:
        file: of a model without a file of settings, its weights, which are only asked for.

    Raises:
        ConfigError: as `fetch`.
    """
    if os.path.isdir(find(model)):
        return
    folder = folder_of(model, file=file)
    if file != SETTINGS:
        if folder is None:
            ask(subject, model, "", file)
    elif folder is None or not has_weights(folder):
        fetch(subject, model, file=file)


@contextmanager
def told_by_id(model: str, folder: Path) -> Iterator[None]:
    """Sentences about a folder of the cache name the hub id instead."""
    try:
        yield
    except ConfigError as error:
        if os.path.isdir(find(model)):
            raise
        raise ConfigError(str(error).replace(str(folder), model)) from None


@contextmanager
def _told(subject: str, model: str, revision: str, file: str) -> Iterator[None]:
    """What the hub's client raises, as a sentence."""
    try:
        yield
    except Exception as error:  # also those of the HTTP library below
        raise ConfigError(
            f"{subject}{model!r} is no folder here, is not in the hub's cache, and cannot be fetched: "
            f"{_reason(error, revision, file)}."
        ) from error


def _reason(error: Exception, revision: str, file: str) -> str:
    """Why, in words of ours where the client's are long."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return "it is for those who have accepted its licence on the hub; do that, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or shows it to its owners alone (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"it has no {file}"
    return f"the hub does not answer ({first_line(error).rstrip('.')})"
