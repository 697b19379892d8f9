"""One writer for a run's folder, for as long as it lives.

The lock is the operating system's (flock, by the filelock library), so it ends with its process, however that ends; on
file systems without flock the library falls back to a file that names its owner. Beside it stands who holds it.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically

LOCK_FILE, OWNER_FILE = "run.lock", "run.lock.json"
TRIES = 20  # within a second, to read who holds a lock


class RunLock:
    """The right to write a run's folder.

    Raises:
        ConfigError: another process has it; the sentence says who, since when and on which host. Or the folder cannot
            be written.
    """

    def __init__(self, folder: Path) -> None:
        self._owner, self._file = folder / OWNER_FILE, folder / LOCK_FILE
        self._is_new = not self._file.exists()
        self._lock = FileLock(self._file, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(in_use(folder)) from None
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from None
        try:
            write_atomically(self._owner, strict_json(_this_process(), indent=2) + "\n")
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from None
        self._identity = _identity(self._file)

    def is_in_place(self) -> bool:
        """Whether the folder still holds this lock: not, once it was moved, deleted or made anew by another process."""
        return _identity(self._file) == self._identity

    def release(self, unused: bool = False) -> None:
        """Let another process have the folder; the lock's file stays, for those who wait on it.

        Args:
            unused: the folder turned out to be none to write in: leave nothing in it that was not there before.
        """
        if self._lock.is_locked:
            with suppress(OSError):  # the folder may have gone
                if self.is_in_place():
                    self._owner.unlink(missing_ok=True)
                    if unused and self._is_new:
                        self._file.unlink(missing_ok=True)
            self._lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file that has this name now; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _this_process() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def command_line() -> str:
    """How this process was started, as it is typed."""
    program = Path(sys.argv[0])
    if program.name == "fme" or program.parts[-2:] == ("commands", "main.py"):
        return shlex.join(["fme", *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def in_use(folder: Path) -> str:
    """The sentence about a folder that is locked."""
    return f"{folder} is being written by {_holder(folder / OWNER_FILE)}; wait for it or stop it."


def is_locked(folder: Path) -> bool:
    """Whether a process is writing a folder at this moment. Nothing is written: the folder may be somebody else's.

    Where the lock cannot be looked at, there is one if its owner stands beside it, as until the run has ended.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return (folder / OWNER_FILE).exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without flock
        return (folder / OWNER_FILE).exists()
    finally:
        os.close(descriptor)
    return False


def _holder(path: Path) -> str:
    """Who holds the lock, in words; one that has just begun needs a moment to write it."""
    for _ in range(TRIES):
        try:
            owner = read_object(path)
            return f"process {owner['process']} on {owner['host']} since {owner['since']}"
        except (ConfigError, KeyError):
            time.sleep(1 / TRIES)
    return "another process"
