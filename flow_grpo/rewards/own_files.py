"""Where the code of a reward of one's own is, as `config.reward_files.NAME` says it. It is read here, never imported.

FILE.py:THING             a file, which may lie anywhere; kept with its whole path
package.module:THING      of an installed package
http://HOST:PORT/...      a server of rewards (client.py), as `fme serve` is one

Packages may announce theirs as entry points of the group `flow_grpo.rewards`, NAME = "package.module:THING".
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from flow_grpo.errors import ConfigError
from flow_grpo.rewards.registry import RewardSpec

GROUP = "flow_grpo.rewards"  # of entry points
SERVERS = ("http://", "https://")
NAME = re.compile(r"[A-Za-z_]\w*")
RESERVED = ("total",)  # names of what is logged beside rewards
PLACES = "FILE.py:THING, package.module:THING or http://HOST:PORT"
MOVED = "a run keeps no copy of it, and --reward {name}=FILE.py:THING says where it is"


@dataclass(frozen=True)
class Place:
    """A reward's code."""

    file: str  # whole path of the file that it is in; empty: none is known, as of a namespace
    module: str  # "package.module"; empty: a file that belongs to none
    thing: str  # its name there


def is_server(text: str) -> bool:
    """Whether a place is the address of a server, which has no code here."""
    return text.startswith(SERVERS)


def in_full(text: str) -> str:
    """FILE.py:THING with the file's whole path; other places as they are."""
    file, _, thing = text.rpartition(":")
    return f"{os.path.abspath(os.path.expanduser(file))}:{thing}" if file.endswith(".py") else text


def find_place(name: str, text: str) -> Place:
    """Where `config.reward_files.<name>` = `text` is.

    Raises:
        ConfigError: it is not written as a place, or there is no such file or module.
    """
    subject = f"config.reward_files.{name} = {text!r}"
    where, _, thing = text.rpartition(":")
    if not thing.isidentifier() or not where:
        raise ConfigError(f"{subject} names no place; it takes {PLACES}.")
    if where.endswith(".py"):
        file = os.path.abspath(os.path.expanduser(where))
        if not os.path.isfile(file):
            raise ConfigError(f"{subject}: there is no file {file}; {MOVED.format(name=name)}.")
        return Place(file, "", thing)
    if not all(part.isidentifier() for part in where.split(".")):
        raise ConfigError(f"{subject} names no place; it takes {PLACES}.")
    spec = _spec_of(where)
    if spec is None:
        raise ConfigError(f"{subject}: there is no module {where} here; it takes {PLACES} that is installed.")
    return Place(spec.origin or "", where, thing)


def _spec_of(module: str) -> ModuleSpec | None:
    """Of a module whose packages are not imported for it, since they may be slow to import; None: there is none."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # of a module without a spec, such as __main__
        return None
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def check_place(name: str, text: str) -> None:
    """Raise ConfigError unless the file can be read as Python, and binds the name that is asked for."""
    place = find_place(name, text)
    if not place.file.endswith(".py"):
        return
    subject = f"config.reward_files.{name}: {place.file}"
    try:
        tree = ast.parse(Path(place.file).read_bytes(), place.file)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(
            f"{subject}{f', line {line}' if line else ''}: {type(error).__name__}: {_text(error)}."
        ) from None
    except OSError as error:
        raise ConfigError(f"{subject} cannot be read ({error.strerror}).") from None
    names, others = _bound(tree)
    if place.thing not in names and not others:
        alike = difflib.get_close_matches(place.thing, names, n=1, cutoff=0.0)
        advice = f"; the nearest is {alike[0]}" if alike else ""
        raise ConfigError(f"{subject} has no {place.thing}{advice}.")


def _text(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error)


def _bound(tree: ast.Module) -> tuple[set[str], bool]:
    """The names that a module binds at its top, and whether it may have others, by a star import or __getattr__."""
    names: set[str] = set()
    rest: list[ast.AST] = list(tree.body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what is inside is not the module's
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        rest += ast.iter_child_nodes(node)
    return names, bool(names & {"*", "__getattr__"})


# --- the option --reward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What `--reward NAME[=...]` asks for."""

    name: str
    model: str = ""  # of a registered reward: its checkpoint; empty: as it is configured
    place: str = ""  # of one's own


def read_option(text: str, registered: Mapping[str, RewardSpec]) -> Asked:
    """What --reward says: NAME or NAME=MODEL of a registered reward, NAME=FILE.py:THING of one's own.

    Raises:
        ConfigError: it is neither.
    """
    name, equals, value = text.partition("=")
    is_place = is_server(value) or value.rpartition(":")[0].endswith(".py")
    if name in registered:
        if is_place:
            raise ConfigError(f"--reward {text}: {name} is a reward already; give yours another name.")
        if equals and registered[name].scorer is None:
            raise ConfigError(f"--reward {text}: it has no model; it takes {name} alone.")
        return Asked(name, model=value)
    if not equals and name in announced():
        return Asked(name, place=announced()[name])
    if not NAME.fullmatch(name) or ":" not in value:
        names = [*registered, *announced()]
        near = "".join(f"; did you mean {one}? It" for one in difflib.get_close_matches(name, names, n=1)) or "; it"
        raise ConfigError(
            f"--reward {text} is not allowed{near} takes NAME or NAME=MODEL, NAME one of {', '.join(names)}, or "
            f"NAME={PLACES}."
        )
    return Asked(name, place=in_full(value))


@lru_cache(maxsize=64)  # of the code that this process has read, whatever becomes of the file
def digest(text: str) -> str:
    """SHA-256 of the file of a place, or of which reward of a server it is, wherever that is; empty: of neither."""
    try:
        if is_server(text):
            return hashlib.sha256(urlsplit(text).path.rstrip("/").encode()).hexdigest()
        file = find_place("", text).file
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (ConfigError, OSError, ValueError):
        return ""


@lru_cache(maxsize=1)
def announced() -> dict[str, str]:
    """The rewards that installed packages announce, by name: their places. Takes a fifth of a second to look up."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}
