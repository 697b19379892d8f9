"""Images from files as people have them: turned as their EXIF says, transparent ones on white, in a bounded memory.

A folder of images is one group under its name; a folder of such folders has a group for each. Files and groups stand in
the order in which people count: 2 before 10. Passed over are hidden files and what systems leave behind (LITTER); every
other file counts as an image.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.files import LIMITS, open_regular

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from flow_grpo.diversity.features import FeatureExtractor

LITTER = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini")
BATCH_PIXELS = 1 << 24  # decoded at once, of one image or more: 200 MB as float32
ORIENTATION = 0x0112  # EXIF's tag, and what undoes each of its values
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
REASON_LENGTH = 200  # characters quoted of a decoder's complaint


# --- folders --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder:
    """Images of one size on disk, at least two in each group; pixels are read when asked for."""

    root: Path
    groups: Mapping[str, tuple[Path, ...]]  # group (a prompt) -> its images, both in the order of their names
    size: tuple[int, int]  # width and height in pixels
    skipped: tuple[Path, ...]  # files left out as unreadable

    def pixels(self, group: str) -> Tensor:
        """The images of a group: (n, 3, H, W) float32 in [0, 1]."""
        return stack(self.groups[group])

    def features(self, extractor: FeatureExtractor) -> dict[str, np.ndarray]:
        """Each group's features (n, d) float32; one batch of images is in memory at a time."""
        step = min(extractor.batch_size, max(1, BATCH_PIXELS // (self.size[0] * self.size[1])))
        found = {}
        for group, paths in self.groups.items():
            batches = (stack(paths[start : start + step]) for start in range(0, len(paths), step))
            found[group] = np.concatenate([extractor(batch) for batch in batches])
        return found


def read_images(folder: Path, keep_readable: bool = False) -> ImageFolder:
    """Find and check the images in `folder`, one group under its name, or in its sub-folders, a group each.

    All are decoded once, so that nothing is found unreadable later; with `keep_readable` the unreadable ones are left
    out and listed.

    Raises:
        ConfigError: no image, files beside sub-folders, an unreadable file, two sizes, a group of fewer than 2.
    """
    found = _find_groups(folder)
    sizes: dict[Path, tuple[int, int]] = {}
    skipped = []
    for path in (path for paths in found.values() for path in paths):
        try:
            height, width = read_rgb(path).shape[:2]
            sizes[path] = (width, height)
        except ConfigError:
            if not keep_readable:
                raise
            skipped.append(path)
    groups = {name: tuple(path for path in paths if path in sizes) for name, paths in found.items()}
    for name, paths in groups.items():
        if len(paths) < 2:
            images = f"{len(paths)} readable image{'s' * (len(paths) != 1)}"
            raise ConfigError(f"the group {name!r} in {folder} has {images}; diversity needs at least 2.")
    return ImageFolder(folder, groups, _only_size(sizes), tuple(skipped))


def _find_groups(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images.")
    files, folders = listing(folder)
    if files and folders:
        raise ConfigError(
            f"{folder} holds both files ({files[0].name}) and folders ({folders[0].name}); it takes images, or a "
            "folder of images for each prompt."
        )
    if not files and not folders:
        raise ConfigError(f"{folder} holds no image.")
    if files:
        return {folder.resolve().name: files}
    groups = {}
    for group in folders:
        groups[group.name], deeper = listing(group)
        if deeper:
            raise ConfigError(f"{group} holds a folder ({deeper[0].name}); the folder of a prompt takes images only.")
    return groups


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders as people count them, without hidden ones and LITTER; ConfigError if it cannot be listed."""
    try:
        paths = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed ({error.strerror}).") from None
    paths = [path for path in paths if not path.name.startswith(".") and path.name.lower() not in LITTER]
    return [path for path in paths if not path.is_dir()], [path for path in paths if path.is_dir()]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """To sort names as people count: "a 2.png" comes before "a 10.png"."""
    parts = re.split(r"([0-9]+)", name)  # letters and digits in turn, letters first
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _only_size(sizes: Mapping[Path, tuple[int, int]]) -> tuple[int, int]:
    first = next(iter(sizes))
    for path, size in sizes.items():
        if size != sizes[first]:
            (width, height), (other_width, other_height) = sizes[first], size
            raise ConfigError(
                f"the images differ in size: {first} is {width} x {height} pixels, "
                f"{path} is {other_width} x {other_height}."
            )
    return sizes[first]


# --- files ----------------------------------------------------------------------------------------------------


def stack(paths: Sequence[Path]) -> Tensor:
    """Images of one size as (n, 3, H, W) float32 in [0, 1]."""
    import torch

    return torch.stack([load_pixels(path) for path in paths])


def load_pixels(path: Path) -> Tensor:
    """An image file as (3, H, W) float32 in [0, 1]; what `read_rgb` refuses is refused."""
    import torch

    return torch.from_numpy(read_rgb(path)).permute(2, 0, 1).contiguous().float().div_(255)


def read_rgb(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8: upright, grey and palette images as RGB, transparent ones laid on white.

    Raises:
        ConfigError: no image, a damaged one, one of more pixels than LIMITS["image"] (known before it is decoded), or
            one of more than 8 bits a channel that is not RGB.
    """
    from PIL import UnidentifiedImageError

    with open_regular(path) as file:
        try:
            return _decoded(file, path)
        except ConfigError:
            raise
        except Exception as error:  # each of Pillow's decoders raises what it likes for a damaged file, some anything
            unknown = isinstance(error, UnidentifiedImageError)  # whose own words are about a Python object
            reason = "no image format" if unknown else one_line(str(error), REASON_LENGTH) or type(error).__name__
            raise ConfigError(f"{path} cannot be read as an image ({reason}).") from None


def _decoded(file: BufferedReader, path: Path) -> np.ndarray:
    from PIL import Image

    with _bounded_pixels(path), Image.open(file) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ConfigError(f"{path} has Pillow's mode {image.mode}; it takes images of 8 bits a channel.")
        turned = TURNS.get(_orientation(image))
        return np.array(_on_white(image if turned is None else image.transpose(Image.Transpose[turned])))


def _orientation(image: Image.Image) -> int:
    """What EXIF says of it, 1 to 8; 1, upright, where it says nothing that can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged note beside the picture, on which Pillow raises what it likes: the picture is whole
        return 1


@contextmanager
def _bounded_pixels(path: Path) -> Iterator[None]:
    """Pillow looks at the size in the header, of images inside the file too, before it decodes; here it refuses."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, LIMITS["image"].value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ConfigError(f"{path} has more than {LIMITS['image']}.") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _on_white(image: Image.Image) -> Image.Image:
    """(H, W) in RGB; where it is transparent, white shines through."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
