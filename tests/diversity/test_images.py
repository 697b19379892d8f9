"""Images of files and folders, as people have them."""

from __future__ import annotations

import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flow_grpo.diversity import images
from flow_grpo.diversity.features import FeatureExtractor
from flow_grpo.diversity.images import listing, load_pixels, natural_key, read_images, read_rgb
from flow_grpo.errors import ConfigError
from tests import pictures
from tests.pictures import to_pil

EXIF_ORIENTATION = 0x0112
TURNS = {  # orientation -> what a camera did to the upright picture before it stored it
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}

make_images = partial(pictures.make_images, count=6)


def save_images(folder: Path, count: int = 3, size: tuple[int, int] = (8, 12), seed: int = 0) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    made = make_images(*size, count=count, seed=seed)
    for index, image in enumerate(to_pil(made)):
        image.save(folder / f"{index}.png")
    return made


# --- folders --------------------------------------------------------------------------------------------------


def test_a_folder_is_one_group(tmp_path: Path) -> None:
    made = save_images(tmp_path / "run")
    (tmp_path / "run" / ".hidden").write_text("not an image")
    folder = read_images(tmp_path / "run")
    assert list(folder.groups) == ["run"]
    assert folder.size == (12, 8)
    assert folder.skipped == ()
    assert torch.equal(folder.pixels("run"), made)


def test_each_sub_folder_is_a_group(tmp_path: Path) -> None:
    made = {name: save_images(tmp_path / name, count, seed=count) for name, count in (("b", 2), ("a bag", 5))}
    folder = read_images(tmp_path)
    assert list(folder.groups) == ["a bag", "b"]
    extractor = FeatureExtractor("means", lambda x: x.mean((2, 3)), "cpu", batch_size=2)
    features = folder.features(extractor)
    for name, group in made.items():
        assert torch.equal(folder.pixels(name), group)
        np.testing.assert_array_equal(features[name], extractor(group))


def test_groups_and_images_stand_as_people_count(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        save_images(tmp_path / f"prompt {number}", count=11)
    groups = read_images(tmp_path).groups
    assert list(groups) == ["prompt 2", "prompt 9", "prompt 10"]
    assert [path.stem for path in groups["prompt 9"]] == [str(number) for number in range(11)]


def test_numbers_within_names_count() -> None:
    names = ["b", "a10", "10", "a2b", "a9", "2"]
    assert sorted(names, key=natural_key) == ["2", "10", "a2b", "a9", "a10", "b"]


def test_what_systems_leave_behind_is_passed_over(tmp_path: Path) -> None:
    save_images(tmp_path)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._0.png").write_bytes(b"no image")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no image")
    assert [path.name for path in read_images(tmp_path).groups[tmp_path.name]] == ["0.png", "1.png", "2.png"]


def test_a_batch_holds_no_more_pixels_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path, count=6, size=(8, 12))
    monkeypatch.setattr(images, "BATCH_PIXELS", 2 * 8 * 12)
    seen: list[int] = []
    extractor = FeatureExtractor("means", lambda x: seen.append(len(x)) or x.mean((2, 3)), "cpu", batch_size=64)
    seen.clear()
    read_images(tmp_path).features(extractor)
    assert seen == [2, 2, 2]


def folder_refusal(folder: Path, **keywords: bool) -> str:
    with pytest.raises(ConfigError) as error:
        read_images(folder, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_without_images_are_one_sentence(tmp_path: Path) -> None:
    assert folder_refusal(tmp_path / "none") == f"{tmp_path}/none is not a folder of images."
    assert folder_refusal(tmp_path) == f"{tmp_path} holds no image."
    save_images(tmp_path / "a" / "b")
    assert "a holds a folder (b)" in folder_refusal(tmp_path)
    (tmp_path / "a" / "b").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / ".elsewhere")
    sentence = f"the group 'a' in {tmp_path} has 0 readable images; diversity needs at least 2."
    assert folder_refusal(tmp_path) == sentence
    (tmp_path / "grid.png").write_bytes(b"")
    assert "holds both files (grid.png) and folders (a)" in folder_refusal(tmp_path)


def test_a_folder_that_cannot_be_listed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be listed \(Permission denied\)\.$"):
        listing(tmp_path)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "deep"])
def test_unreadable_files_are_named_or_left_out_when_asked(tmp_path: Path, damage: str) -> None:
    made = save_images(tmp_path, count=4, size=(40, 40))
    bad = tmp_path / "1.png"
    if damage == "deep":
        Image.fromarray(np.full((40, 40), 60000, dtype=np.uint16)).save(bad)
    else:
        bad.write_bytes({"text": b"no image", "empty": b"", "cut": bad.read_bytes()[:-500]}[damage])
    assert str(bad) in folder_refusal(tmp_path)
    folder = read_images(tmp_path, keep_readable=True)
    assert folder.skipped == (bad,)
    assert torch.equal(folder.pixels(tmp_path.name), made[[0, 2, 3]])


def damaged_dds(path: Path) -> None:
    """A texture of a format that Pillow does not know."""
    Image.new("RGB", (40, 40)).save(path, format="DDS")
    content = bytearray(path.read_bytes())
    content[80:88] = struct.pack("<I4s", 0x4, b"XXXX")
    path.write_bytes(content)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [damaged_dds, a_fifo])
def test_whatever_a_decoder_meets_is_one_sentence_or_one_file_left_out(tmp_path: Path, damage) -> None:
    save_images(tmp_path, count=2, size=(40, 40))
    damage(tmp_path / "bad")
    assert str(tmp_path / "bad") in folder_refusal(tmp_path)
    assert read_images(tmp_path, keep_readable=True).skipped == (tmp_path / "bad",)


@pytest.mark.parametrize("raised", [RuntimeError("Decoding of color planes failed"), KeyError(7), MemoryError()])
def test_an_error_of_any_kind_from_a_decoder_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    """RuntimeError is what a damaged AVIF gives, where Pillow reads them."""
    save_images(tmp_path)

    def fail(*_) -> None:
        raise raised

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ConfigError, match=r"0\.png cannot be read as an image \((Decoding|7|MemoryError)"):
        read_rgb(tmp_path / "0.png")


def test_what_is_left_must_be_two_images(tmp_path: Path) -> None:
    save_images(tmp_path, count=2)
    (tmp_path / "1.png").write_bytes(b"no image")
    sentence = f"the group '{tmp_path.name}' in {tmp_path} has 1 readable image; diversity needs at least 2."
    assert folder_refusal(tmp_path, keep_readable=True) == sentence


def test_two_sizes_are_named(tmp_path: Path) -> None:
    save_images(tmp_path / "a")
    save_images(tmp_path / "b", size=(12, 8))
    assert folder_refusal(tmp_path) == (
        f"the images differ in size: {tmp_path}/a/0.png is 12 x 8 pixels, {tmp_path}/b/0.png is 8 x 12."
    )


# --- files ----------------------------------------------------------------------------------------------------


def test_modes_of_eight_bits_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 2), (255, 51, 0))
    for index, mode in enumerate(("RGBA", "P", "CMYK")):
        red.convert(mode).save(tmp_path / f"{index}.{'tiff' if mode == 'CMYK' else 'png'}")
        pixels = load_pixels(tmp_path / f"{index}.{'tiff' if mode == 'CMYK' else 'png'}")
        assert torch.equal(pixels, torch.tensor([1.0, 0.2, 0.0]).view(3, 1, 1).expand(3, 2, 4))
        assert pixels.is_contiguous()
    Image.new("1", (4, 2), 1).save(tmp_path / "white.png")
    assert torch.equal(load_pixels(tmp_path / "white.png"), torch.ones(3, 2, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(tmp_path: Path, mode: str) -> None:
    """The left half is opaque, the right one hides black behind full transparency."""
    picture = Image.new("RGBA", (4, 2), (51, 51, 51, 255))
    picture.paste((0, 0, 0, 0), (2, 0, 4, 2))
    picture.convert(mode).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "picture.png")[..., 0], [[51, 51, 255, 255]] * 2)


def test_a_half_transparent_colour_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 51)).save(tmp_path / "picture.png")  # a fifth
    np.testing.assert_array_equal(read_rgb(tmp_path / "picture.png")[0, 0], [255, 204, 204])


@pytest.mark.parametrize(("orientation", "turn"), TURNS.items())
def test_a_picture_stored_turned_is_the_upright_one(tmp_path: Path, orientation: int, turn) -> None:
    (upright,) = to_pil(make_images(8, 12, count=1))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    turned = ImageOps.exif_transpose(upright).transpose(turn)
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "turned.png"), np.asarray(upright))


def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_GRPO_MAX_IMAGE_MEGAPIXELS", "1")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for side in (1001, 2000):  # over once and over twice the limit, which Pillow tells apart
        Image.new("L", (side, side)).save(tmp_path / "large.png")
        with pytest.raises(ConfigError, match=r"large\.png has more than 1 megapixels \(FLOW_GRPO_MAX_IMAGE_MEGAPIX"):
            read_rgb(tmp_path / "large.png")


def test_the_limit_is_ours_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    assert read_rgb(tmp_path / "small.png").shape == (8, 8, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_pillow_does(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(read_rgb(tmp_path / "a.png"), np.asarray(expected))


def test_a_damaged_note_beside_a_whole_picture_leaves_it_readable(tmp_path):
    pixels = np.full((4, 6, 3), 7, np.uint8)
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nzzzz")
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(read_rgb(tmp_path / "a.png"), pixels)
