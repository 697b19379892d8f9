"""Reading files that anybody may have written, and writing files that a crash cannot tear.

Reading: regular files only (a FIFO would hang), within stated limits, as UTF-8 whatever the locale; all that can be
wrong with a file is a ConfigError of one sentence. Writing: under another name, forced to the disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError

TEMPORARY = ".tmp"  # the end of the name of a file that is being written


# --- limits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """How large something read from a file may be; the environment variable `variable` changes it."""

    variable: str
    default: int
    unit: str
    factor: int = 1  # of the unit, in bytes, characters or pixels

    @property
    def value(self) -> int:
        """In bytes, characters or pixels; ConfigError if the environment says no whole number from 1 on."""
        given = os.environ.get(self.variable, str(self.default))
        if not (given.isascii() and given.isdecimal() and len(given) < 16 and int(given) > 0):
            raise ConfigError(f"{self.variable}={given} is not allowed; it takes a whole number of {self.unit}.")
        return int(given) * self.factor

    def __str__(self) -> str:
        return f"{self.value // self.factor} {self.unit} ({self.variable})"


MEBIBYTE = 1 << 20
LIMITS = {
    "json": Limit("FLOW_GRPO_MAX_JSON_MIB", 64, "MiB", MEBIBYTE),
    "history": Limit("FLOW_GRPO_MAX_HISTORY_MIB", 1024, "MiB", MEBIBYTE),  # a run's metrics.jsonl
    "prompts": Limit("FLOW_GRPO_MAX_PROMPTS_MIB", 256, "MiB", MEBIBYTE),  # a prompt file
    "prompt": Limit("FLOW_GRPO_MAX_PROMPT_KIB", 64, "KiB", 1024),  # a line of it: tokenizers take seconds for more
    "image": Limit("FLOW_GRPO_MAX_IMAGE_MEGAPIXELS", 64, "megapixels", 1_000_000),  # of an image that is read
}


# --- reading --------------------------------------------------------------------------------------------


def open_regular(path: Path, subject: str = "") -> BufferedReader:
    """Open a regular file to read its bytes; never waits. The caller closes it.

    Args:
        subject: what the sentence of an error begins with, such as "config.eval.modes: ".

    Raises:
        ConfigError: there is no such file, it may not be read, or it is a folder, a pipe, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO opens at once
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise ConfigError(f"{subject}{path} cannot be read ({reason}).") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{subject}{path} is not a regular file.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: str, subject: str = "") -> bytes:
    """The content of a regular file of at most LIMITS[limit]; ConfigError otherwise."""
    bound = LIMITS[limit]
    with open_regular(path, subject) as file:
        try:
            content = file.read(bound.value + 1)
        except OSError as error:
            raise ConfigError(f"{subject}{path} cannot be read ({error.strerror}).") from None
    if len(content) > bound.value:
        raise ConfigError(f"{subject}{path} is larger than {bound}.")
    return content


def read_text(path: Path, limit: str = "json", subject: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark; ConfigError names the line that is something else."""
    content = read_bytes(path, limit, subject)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{subject}{path}, line {number}, is not UTF-8 text.") from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; ConfigError, beginning with `where`, for whatever is none or cannot be held."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ConfigError(f"{where} is not JSON ({error.msg}, {place}).") from None
    except RecursionError:
        raise ConfigError(f"{where} is JSON nested too deep to be read.") from None
    except ValueError:  # Python's bound on the digits of a whole number
        raise ConfigError(f"{where} is JSON with a number of too many digits.") from None


def read_json(path: Path, subject: str = "") -> Any:
    """The value in a JSON file; ConfigError if there is none."""
    return parse_json(read_text(path, "json", subject), f"{subject}{path}")


def read_object(path: Path, subject: str = "") -> dict[str, Any]:
    """The object in a JSON file; ConfigError if there is none."""
    value = read_json(path, subject)
    if not isinstance(value, dict):
        raise ConfigError(f"{subject}{path} is not a JSON object.")
    return value


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal; ConfigError if it cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None


# --- writing --------------------------------------------------------------------------------------------


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities are null, and the text is ASCII."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one piece: a reader, or a crash, sees the old content or the new. Text is UTF-8.

    An OSError (a full disk, a folder that has gone) leaves the old file, and nothing besides.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
        del error  # some network file systems refuse it for folders, and need no such call
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder, and all in it, to the disk; files get the mode that the umask gives, whoever wrote them."""
    mode = 0o666 & ~_umask()
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(root, name)
            file.chmod(mode)  # some libraries write 0600
            sync(file)
        sync(Path(root))


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
