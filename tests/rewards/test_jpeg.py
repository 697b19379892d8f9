"""The size of an image as JPEG."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from flow_grpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from tests.pictures import make_images, to_pil
from tests.rewards.scoring import NO_METADATA


def test_jpeg_size_is_the_file_that_pillow_writes(tmp_path: Path) -> None:
    images = make_images(48, 64)
    expected = []
    for image in to_pil(images):
        image.save(tmp_path / "image.jpg", quality=95)
        expected.append((tmp_path / "image.jpg").stat().st_size / 1000)
    sizes = JpegIncompressibility()(images, [""] * 4, NO_METADATA * 4)
    assert sizes.dtype == torch.float32
    torch.testing.assert_close(sizes, torch.tensor(expected), rtol=1e-7, atol=0)
    assert torch.equal(JpegCompressibility()(images, [""] * 4, NO_METADATA * 4), -sizes)

    buffer = io.BytesIO()
    to_pil(images)[0].save(buffer, format="JPEG", quality=90)
    assert buffer.tell() / 1000 < 0.9 * expected[0]  # another quality is another reward


def test_jpeg_size_grows_with_noise() -> None:
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.stack([0.5 + amplitude * (noise - 0.5) for amplitude in (0.0, 0.1, 0.3, 1.0)])
    assert JpegIncompressibility()(images, [""] * 4, NO_METADATA * 4).diff().min() > 0.1
