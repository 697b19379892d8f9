"""Where a file is that a setting names: settings say "assets/..." wherever they are read, and no machine's paths.

Nothing heavy is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = "assets"
_PACKAGE = Path(__file__).resolve().parent
# The wheel has flow_grpo/assets; a checkout has assets/ beside flow_grpo/.
HOME = _PACKAGE if (_PACKAGE / ASSETS).is_dir() else _PACKAGE.parent


def find(path: str) -> str:
    """The place of a file or folder: in the working folder or, of "assets/...", beside the package; else unchanged.

    "~" is written out. A hub id comes back as it is, unless the working folder holds a folder of that name.
    """
    given = os.path.expanduser(path)
    if os.path.isabs(given) or os.path.lexists(given) or Path(given).parts[:1] != (ASSETS,):
        return given
    beside = HOME / given
    return str(beside) if os.path.lexists(beside) else given


def identity(model: str) -> str:
    """What tells models apart: a folder by its place, whatever it is called, and a hub id by itself."""
    return os.path.realpath(find(model))


def in_full(path: str) -> str:
    """The whole path of what is in the working folder; assets, and names of what is not there, as they are."""
    given = os.path.expanduser(path)
    is_here = os.path.lexists(given) and Path(given).parts[:1] != (ASSETS,)
    return os.path.abspath(given) if is_here else path


def find_from(path: str, folder: str) -> str:
    """What `path` meant in `folder`, where a run was started: its place there, unless that is its place here.

    Assets that are found stay as they are.

    A file of that name in the present working folder is another one, and never stands in for the run's own.
    """
    there = os.path.join(folder, os.path.expanduser(path))
    if not path or not folder or not os.path.lexists(there):
        return path
    here = find(path)
    is_same = os.path.exists(here) and os.path.exists(there) and os.path.samefile(here, there)
    is_asset = Path(path).parts[:1] == (ASSETS,) and os.path.lexists(here)
    return path if is_same or is_asset else there
