"""What a reward's client and server send each other: safetensors with 8-bit images, and PNGs in JSON. Never pickle.

A request is answered with the digest of its body, so that scores cannot be taken for those of other images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from flow_grpo.rewards.registry import Metadata

SAFETENSORS, JSON = "application/x-safetensors", "application/json"
TOKEN_VARIABLE = "FME_REWARD_TOKEN"  # the environment variable that both sides read


def digest_of(body: bytes) -> str:
    """Of a request's body, as an answer to it repeats it."""
    return hashlib.sha256(body).hexdigest()


def pack(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> bytes:
    """A request's body: images (B, 3, H, W) in [0, 1], rounded to 8 bits, B prompts and B metadata."""
    texts = {"prompts": json.dumps(list(prompts)), "metadata": json.dumps([dict(one) for one in metadata])}
    return save({"images": eight_bit(images)}, metadata=texts)


def unpack(body: bytes, kind: str, most: int, size: int) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Images (B, 3, H, W) float32 in [0, 1], prompts and metadata of a body of the content type `kind`.

    Raises:
        ValueError: it is something else, or has no image or more than `most`, or PNGs whose pixels would take more than
            `size` bytes; in words that go back to the client.
    """
    if kind == SAFETENSORS:
        images, texts = _of_safetensors(body)
    elif kind == JSON:
        images, texts = _of_json(body, most, size)
    else:
        raise ValueError(f"the content type is {kind!r:.80}; it takes {SAFETENSORS} or {JSON}")
    if not images.shape[2:].numel():
        raise ValueError("the images have no pixels")
    prompts, metadata = texts.get("prompts"), texts.get("metadata") or [{}] * len(images)
    kinds = (("prompts", prompts, "a text", str), ("metadata", metadata, "an object", dict))
    for name, values, word, accepted in kinds:
        if not (isinstance(values, list) and all(isinstance(value, accepted) for value in values)):
            raise ValueError(f'"{name}" is not a list with {word} for each image')
        if len(values) != len(images):
            raise ValueError(f'there are {len(images)} images and {len(values)} of "{name}"')
    if not 1 <= len(images) <= most:
        raise ValueError(f"there are {len(images)} images; a request takes 1 to {most}")
    return images.float() / 255, list(prompts or ()), list(metadata)


def eight_bit(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> uint8 on the CPU. ValueError for images that are not finite."""
    if not images.isfinite().all():
        raise ValueError("an image is not finite")
    return (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()


def png_text(image: Tensor) -> str:
    """One image (3, H, W) uint8 -> its PNG in base64."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _of_safetensors(body: bytes) -> tuple[Tensor, dict[str, Any]]:
    try:
        tensors = load(body)
        length = int.from_bytes(body[:8], "little")
        said = json.loads(body[8 : 8 + length]).get("__metadata__", {})
        texts = {name: json.loads(said[name]) for name in ("prompts", "metadata") if name in said}
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"the body is no safetensors file with prompts ({type(error).__name__})") from None
    images = tensors.get("images")
    if images is None or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError('the body has no tensor "images" of uint8 (B, 3, H, W)')
    return images, texts


def _of_json(body: bytes, most: int, size: int) -> tuple[Tensor, dict[str, Any]]:
    try:
        texts = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    pictures = texts.get("images") if isinstance(texts, dict) else None
    if not isinstance(pictures, list) or not 1 <= len(pictures) <= most:
        raise ValueError(f'the body has no list "images" of 1 to {most} PNGs in base64')
    try:
        opened = [Image.open(io.BytesIO(base64.b64decode(one, validate=True)), formats=["PNG"]) for one in pictures]
        pixels = sum(one.width * one.height for one in opened)  # as the headers say: nothing is decoded yet
        if 3 * pixels <= size:
            return torch.stack([pil_to_tensor(one.convert("RGB")) for one in opened]), texts
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, TypeError, RuntimeError):
        raise ValueError('"images" are not PNGs in base64, all of one size') from None
    raise ValueError(f'"images" have {pixels} pixels; of three bytes each they may have {size // 3}')
