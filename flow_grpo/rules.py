"""What a setting is, and what it may be: rules say whether a value is allowed, and what is, in words.

Torch is not imported.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flow_grpo.files import LIMITS


@dataclass(frozen=True)
class Rule:
    """What one value may be."""

    accepts: Callable[[Any], bool]
    allowed: str  # completes "it takes ..."


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str  # in full, as "train.beta"
    default: Any  # its type is that of every value
    rule: Rule
    meaning: str


def whole(low: int, high: int | None = None) -> Rule:
    """Whole numbers from low to high; None: no bound."""

    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    return Rule(accepts, f"a whole number of at least {low}" if high is None else f"a whole number, {low} to {high}")


def number(allowed: str, within: Callable[[float], bool]) -> Rule:
    """Finite numbers, whole ones too."""

    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and within(value)

    return Rule(accepts, allowed)


def choice(*names: str) -> Rule:
    """One of these texts."""
    return Rule(lambda value: value in names, " or ".join(f'"{name}"' for name in names))


def each(rule: Rule, allowed: str, low: int = 0, high: int | None = None) -> Rule:
    """A tuple of low ... high values of one kind."""

    def accepts(value: Any) -> bool:
        fits = isinstance(value, tuple | list) and len(value) >= low and (high is None or len(value) <= high)
        return fits and all(map(rule.accepts, value))

    return Rule(accepts, allowed)


def or_null(rule: Rule) -> Rule:
    """What the rule allows, and None."""
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.allowed}, or null")


def colour(or_else: str) -> Rule:
    """The name of a colour, as CSS has it, or #rrggbb; or an empty text, in words `or_else`."""

    def accepts(value: Any) -> bool:
        from PIL import ImageColor  # of no other rule

        known = isinstance(value, str) and value in ImageColor.colormap
        return value == "" or known or (isinstance(value, str) and bool(re.fullmatch("#[0-9a-fA-F]{6}", value)))

    return Rule(accepts, f'a colour\'s name, as "red" or "skyblue", or "#rrggbb", or {or_else}')


def only(value: Any, why: str) -> Rule:
    """This value; `why` completes "it takes"."""
    return Rule(lambda given: given == value, why)


def text_fault(text: str) -> str:
    """What makes a text unfit for tokenizers and files, as the end of a sentence about it; "": nothing."""
    if "\0" in text:
        return "has a null character"
    try:
        length = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return f"has \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character"
    return f"is longer than {LIMITS['prompt']}" if length > LIMITS["prompt"].value else ""


def is_text(value: Any) -> bool:
    """Whether it is a text that tokenizers and files can hold."""
    return isinstance(value, str) and not text_fault(value)


def folder(allowed: str, longest: int = 255) -> Rule:
    """A path whose folders have names of at most so many bytes, without control characters."""

    def accepts(value: Any) -> bool:
        fits = is_text(value) and not any(unicodedata.category(letter) == "Cc" for letter in value)
        return fits and all(len(part.encode()) <= longest for part in value.split("/")) and len(value.encode()) < 2048

    return Rule(accepts, f"{allowed}, of names of at most {longest} bytes without control characters")


# Of numbers that divide or multiply tensors: in float32 their squares are neither 0 nor infinite.
SMALLEST, LARGEST = 1e-15, 1e12
WITHIN = f"a number from {SMALLEST:g} to {LARGEST:g}"
POSITIVE = number(WITHIN, lambda x: SMALLEST <= x <= LARGEST)
NOT_NEGATIVE = number(f"0, or {WITHIN}", lambda x: x == 0 or SMALLEST <= x <= LARGEST)
BELOW_ONE = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
FINITE = number("a finite number", lambda x: True)
YES_OR_NO = Rule(lambda value: isinstance(value, bool), "True or False")
TEXT = Rule(is_text, "text")
FILLED = Rule(lambda value: is_text(value) and value.strip() != "", "text that is not empty")
