"""--config.KEY=VALUE: which keys a command line changes, and to what.

--config.train.beta=0.02   --config.train.beta 0.02   a value of the kind that the key's default has
--config.use_lora          --noconfig.use_lora        True and False
--config.trackers=wandb    --config.trackers=tensorboard   a tuple takes literals, or one value at a time
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from flow_grpo.errors import ConfigError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", tuple: 'a quoted tuple such as ("a", "b")'}
YES, NO = ("true", "t", "1"), ("false", "f", "0")
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
HINT = "overrides look like --config.KEY=VALUE."


def read_overrides(arguments: Sequence[str], declared: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value; of a key that is given twice the last, but a tuple is collected.

    Args:
        declared: every key and its default; keys of the arguments are among them.

    Raises:
        ConfigError: an argument is no override, lacks its value, or has one of another kind.
    """
    found: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            raise ConfigError(f"the argument {argument} is not understood; {HINT}")
        no, key, text = match.groups()
        is_flag = isinstance(declared[key], bool)
        if no and (text is not None or not is_flag):
            raise ConfigError(f"the argument {argument} is not understood: only switches have a --no form; {HINT}")
        if text is None:
            text = str(not no) if is_flag else next(rest, None)
        if text is None:
            raise ConfigError(f"Missing value for --config.{key}; {HINT}")
        value = _value(key, text, declared[key])
        found[key] = found.get(key, ()) + value if isinstance(value, tuple) else value
    return found


def _value(key: str, text: str, default: Any) -> Any:
    """The text as a value of the kind of the default."""
    with suppress(ValueError, SyntaxError, KeyError):
        if isinstance(default, bool):
            return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}[text.lower()]
        if isinstance(default, tuple | list):
            return _tuple(text)
        return type(default)(text)
    raise ConfigError(f"config.{key} = {text!r} is not allowed; it takes {KINDS.get(type(default), 'text')}.")


def _tuple(text: str) -> tuple[Any, ...]:
    """(1, 2), [1, 2] and 1, 2; a bare word is a tuple of one."""
    if re.fullmatch(r"[\w./-]*[A-Za-z][\w./-]*", text):
        return (text,)
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)
