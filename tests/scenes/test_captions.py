"""Captions of scenes: their grammar, and which pictures satisfy them."""

from __future__ import annotations

import itertools
import random

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.scenes.captions import (
    CLASSES,
    COLOURS,
    KINDS,
    Caption,
    Garment,
    Reading,
    captions_of,
    is_held_out,
    parse,
)

COUNTS = {"single": 10, "two": 90, "count": 30, "colour": 80, "position": 180, "binding": 5040}
READINGS = {"single": {4}, "two": {12}, "count": {6, 4, 1}, "colour": {4}, "position": {4}, "binding": {12}}
DRESS, BOOT = CLASSES.index("dress"), CLASSES.index("boot")
RED, BLUE = list(COLOURS).index("red"), list(COLOURS).index("blue")


def picture(*cells: str) -> Reading:
    """Four cells, each "" or "red dress"."""
    found: list[Garment | None] = []
    for cell in cells:
        colour, _, name = cell.partition(" ")
        found.append(Garment(CLASSES.index(name), list(COLOURS).index(colour)) if cell else None)
    return tuple(found)


def drawn(caption: Caption, rng: random.Random) -> Reading:
    """A picture drawn by rule: a reading of the caption with random colours where it leaves them open."""
    cells = rng.choice(caption.readings())
    return tuple(
        cell and Garment(cell.label, rng.randrange(8) if cell.colour is None else cell.colour) for cell in cells
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_reads_back_as_itself(kind):
    captions = captions_of(kind)
    assert len({caption.text for caption in captions}) == len(captions) == COUNTS[kind]
    assert all(parse(caption.text) == caption for caption in captions)
    assert {len(caption.readings()) for caption in captions} == READINGS[kind]


def test_captions_are_written_in_english():
    captions = [
        "a dress",
        "a dress and a boot",
        "three dresses",
        "an orange dress",
        "a dress above a boot",
        "a red dress and an orange t-shirt",
    ]
    assert [parse(text).kind for text in captions] == list(KINDS)


@pytest.mark.parametrize("text", ["a red dress and a red boot", "five boots", "a cat", "a boot and a boot", ""])
def test_what_is_no_caption_is_one_sentence_that_quotes_it(text):
    with pytest.raises(ConfigError, match="is not a caption of a scene") as error:
        parse(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("caption", "cells", "right"),
    [
        ("a dress", ("", "", "red dress", ""), True),
        ("a dress", ("", "", "red dress", "red dress"), False),
        ("a dress", ("", "", "", ""), False),
        ("a dress and a boot", ("red boot", "", "red dress", ""), True),
        ("a dress and a boot", ("red boot", "", "", ""), False),
        ("three dresses", ("red dress", "blue dress", "red dress", ""), True),
        ("three dresses", ("red dress", "blue dress", "red dress", "gray dress"), False),
        ("three dresses", ("red dress", "blue dress", "red coat", ""), False),
        ("a red dress", ("red dress", "", "", ""), True),
        ("a red dress", ("blue dress", "", "", ""), False),
        ("a dress left of a boot", ("red dress", "", "", "red boot"), True),
        ("a dress left of a boot", ("red boot", "", "", "red dress"), False),
        ("a dress left of a boot", ("red dress", "", "red boot", ""), False),
        ("a dress above a boot", ("red dress", "", "red boot", ""), True),
        ("a dress above a boot", ("red dress", "red boot", "", ""), False),
        ("a red dress and a blue boot", ("blue boot", "red dress", "", ""), True),
        ("a red dress and a blue boot", ("red boot", "blue dress", "", ""), False),
    ],
)
def test_rules_worked_by_hand(caption, cells, right):
    assert parse(caption).is_satisfied(picture(*cells)) is right


def independently(caption: Caption, cells: Reading) -> bool:
    """The rule of a caption, written from its words and not from its readings."""
    objects = [(place, cell) for place, cell in enumerate(cells) if cell is not None]
    if len(objects) != len(caption.garments):
        return False
    for order in itertools.permutations(objects):
        fits = all(
            said.label == seen.label and said.colour in (None, seen.colour)
            for said, (_, seen) in zip(caption.garments, order, strict=True)
        )
        places = [place for place, _ in order]
        if "left of" in caption.text:
            fits = fits and places[0] % 2 == 0 and places[1] % 2 == 1
        if "above" in caption.text:
            fits = fits and places[0] < 2 <= places[1]
        if fits:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_those_of_an_independent_checker(kind):
    """On pictures drawn for this caption, and for one that is near to it or far from it."""
    rng = random.Random(kind)
    captions = captions_of(kind)
    for _ in range(500):
        caption = rng.choice(captions)
        near = Caption(kind, caption.garments[::-1], caption.relation)
        for source in (caption, near, rng.choice(captions_of(rng.choice(KINDS)))):
            cells = drawn(source, rng)
            assert caption.is_satisfied(cells) == independently(caption, cells)
        assert caption.is_satisfied(drawn(caption, rng))


def test_each_class_is_held_out_somewhere_and_trained_everywhere():
    for kind in KINDS:
        captions = captions_of(kind)
        held = [caption for caption in captions if is_held_out(caption)]
        rest = [caption for caption in captions if not is_held_out(caption)]
        assert {g.label for caption in rest for g in caption.garments} == set(range(10))
        assert kind == "single" or {g.label for caption in held for g in caption.garments} == set(range(10))
        assert len(held) <= len(captions) / 3


def test_no_pair_is_trained_in_one_kind_and_held_out_in_another():
    pairs = {True: set(), False: set()}
    for kind in ("two", "position", "binding"):
        for caption in captions_of(kind):
            pairs[is_held_out(caption)].add(frozenset(garment.label for garment in caption.garments))
    assert not pairs[True] & pairs[False]
    assert len(pairs[True]) == 10
