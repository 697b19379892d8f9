"""What a caption of a scene says: its grammar, and every reading of a picture that satisfies it.

The six kinds are GenEval's (arXiv 2310.11513):

    single    a dress                             one object
    two       a dress and a boot                  two objects of different classes
    count     three dresses                       two, three or four objects of one class
    colour    a red dress                         one object and its colour
    position  a dress left of a boot, ... above   two objects, and the columns or rows they are in
    binding   a red dress and a blue boot         two objects with different colours

A picture is right if it shows these objects and no others. What a caption leaves open (cells, colours) may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations

from flow_grpo.errors import ConfigError

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COLOURS = {  # name -> sRGB
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 40),
    "purple": (150, 50, 190),
    "orange": (240, 130, 30),
    "pink": (245, 130, 180),
    "gray": (150, 150, 150),
}
KINDS = ("single", "two", "count", "colour", "position", "binding")
OPEN_COLOURS = ("single", "two", "count", "position")  # kinds that say no colour
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "above")
CELLS = 4  # 0 1 above 2 3


@dataclass(frozen=True)
class Garment:
    """An object of a caption or of a picture."""

    label: int  # index into CLASSES
    colour: int | None = None  # index into COLOURS; None: not said


Reading = tuple[Garment | None, ...]  # what is in each of the four cells; None: nothing


@dataclass(frozen=True)
class Caption:
    """A caption, understood."""

    kind: str
    garments: tuple[Garment, ...]  # in the order of the words; of `count`, each of them
    relation: str | None = None  # of `position`: "left of" or "above"

    @property
    def text(self) -> str:
        """The caption itself."""
        if self.kind == "count":
            number = {count: word for word, count in NUMBERS.items()}[len(self.garments)]
            return f"{number} {plural(CLASSES[self.garments[0].label])}"
        between = f" {self.relation or 'and'} "
        return between.join(noun_phrase(garment) for garment in self.garments)

    @lru_cache(maxsize=8192)  # noqa: B019 - of values, of which there are no more
    def readings(self) -> tuple[Reading, ...]:
        """Every reading of a picture that satisfies the caption, with the colours that it leaves open as None."""
        places = combinations if self.kind == "count" else permutations  # alike, so in any order
        return tuple(
            tuple(self.garments[cells.index(cell)] if cell in cells else None for cell in range(CELLS))
            for cells in places(range(CELLS), len(self.garments))
            if self._related(cells)
        )

    def _related(self, cells: tuple[int, ...]) -> bool:
        """Whether the objects stand to one another as the caption says."""
        if self.relation is None:
            return True
        first, second = (divmod(cell, 2) for cell in cells)  # row, column
        axis = 1 if self.relation == "left of" else 0
        return first[axis] < second[axis]

    def is_satisfied(self, picture: Reading) -> bool:
        """Whether a picture, of whose objects class and colour are known, shows what the caption says."""
        return any(all(map(_fits, reading, picture)) for reading in self.readings())


def _fits(said: Garment | None, seen: Garment | None) -> bool:
    """Whether a cell shows what a reading says of it."""
    if said is None or seen is None:
        return said is seen
    return said.label == seen.label and said.colour in (None, seen.colour)


def noun_phrase(garment: Garment) -> str:
    """ "a sneaker", or with a colour "an orange sneaker"."""
    words = [] if garment.colour is None else [list(COLOURS)[garment.colour]]
    words.append(CLASSES[garment.label])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def plural(word: str) -> str:
    """ "dresses", "coats"."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


@lru_cache
def _all() -> dict[str, Caption]:
    """Text -> caption, of every caption there is."""
    return {caption.text: caption for kind in KINDS for caption in captions_of(kind)}


def parse(text: str) -> Caption:
    """Understand a caption; ConfigError if it is not one of a scene."""
    caption = _all().get(text)
    if caption is None:
        raise ConfigError(
            f"{text!r:.80} is not a caption of a scene; they are written as 'a dress', 'a dress and a boot', "
            "'three dresses', 'a red dress', 'a dress left of a boot' (or above), 'a red dress and a blue boot', "
            f"with the garments {', '.join(CLASSES)} and the colours {', '.join(COLOURS)}."
        )
    return caption


@lru_cache
def captions_of(kind: str) -> tuple[Caption, ...]:
    """Every caption of a kind: 10 single, 90 two, 30 count, 80 colour, 180 position, 5040 binding."""
    labels, colours = range(len(CLASSES)), range(len(COLOURS))
    singles: list[tuple[Garment, ...]] = [(Garment(label),) for label in labels]
    pairs: list[tuple[Garment, ...]] = [(Garment(first), Garment(second)) for first, second in permutations(labels, 2)]
    garments: dict[str, list[tuple[Garment, ...]]] = {
        "single": singles,
        "two": pairs,
        "count": [one * number for one in singles for number in NUMBERS.values()],
        "colour": [(Garment(label, colour),) for label in labels for colour in colours],
        "position": pairs,
        "binding": [
            (Garment(one.label, colour), Garment(other.label, another))
            for one, other in pairs
            for colour, another in permutations(colours, 2)
        ],
    }
    relations = RELATIONS if kind == "position" else (None,)
    return tuple(Caption(kind, objects, relation) for objects in garments[kind] for relation in relations)


def is_held_out(caption: Caption) -> bool:
    """Whether neither the tiny model nor a recipe is trained on a caption.

    Held out are 10 of the 45 pairs of classes (each class is in two) in every kind that has pairs; for each class one
    of the three numbers; and two of the eight colours where it stands alone. No single object is.
    """
    labels = sorted({garment.label for garment in caption.garments})
    first = caption.garments[0]
    if len(labels) == 2:
        return labels[1] - labels[0] == len(CLASSES) // 2 or (labels[0] % 2 == 0 and labels[1] == labels[0] + 1)
    if caption.kind == "count":
        return len(caption.garments) == 2 + first.label % len(NUMBERS)
    return first.colour is not None and first.colour % 4 == first.label % 4
