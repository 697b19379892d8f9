"""Features of images, in which their diversity is measured: CLIP, DINOv2, open_clip, or a detector of scenes.

Features of every kind have unit length: the cosine is then their product, and a Gaussian bandwidth means the same for
all. They are CLIP's image embedding (the projected one), DINOv2's class token after the last normalisation
(arXiv 2304.07193), what open_clip's `encode_image` returns, and what a detector sees in each cell of a scene.

Images are rounded to 8 bits and resized as each library's own preprocessing does, so an image in memory and the same
image read from a PNG have the same features.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_json
from flow_grpo.models.files import LOADING_ERRORS
from flow_grpo.paths import find
from flow_grpo.rewards.checks import check_checkpoint
from flow_grpo.scenes.captions import CELLS
from flow_grpo.scenes.files import RESOLUTION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_MODEL = "assets/tiny_features"
DINOV2_TYPES = ("dinov2", "dinov2_with_registers")
OPEN_CLIP_KEYS = ("embed_dim", "vision_cfg", "text_cfg")  # of a model's configuration
HUB, DIRECTORY = "hf-hub:", "local-dir:"  # open_clip's words before a model that brings its weights
REASON_LENGTH = 200  # characters quoted of a library's complaint

Encode = Callable[["Tensor"], "Tensor"]  # images (B, 3, H, W) float32 in [0, 1], on the device -> (B, d)


class NonFiniteFeatures(ConfigError):
    """Features that are infinite or nan: the images or the weights behind them are broken, a training run goes on."""


class FeatureExtractor:
    """A frozen image encoder: float32 and without gradient, whatever surrounds the call."""

    def __init__(self, name: str, encode: Encode, device: torch.device | str, batch_size: int) -> None:
        """Encode one image to learn `dims`; ConfigError if the batch size is below 1, or that feature not finite."""
        import torch

        if batch_size < 1:
            raise ConfigError(f"the batch size of {name} is {batch_size}; it takes a whole number of at least 1.")
        self.name = name  # all that says which features these are: kind, model, pretrained tag or file
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._encode = encode
        self.dims = self(torch.full((1, 3, 64, 64), 0.5)).shape[1]

    def __call__(self, images: Tensor) -> np.ndarray:
        """Images (B, 3, H, W) float in [0, 1], on any device -> (B, d) float32 of unit length.

        Raises:
            ValueError: images of another kind, shape or range.
            NonFiniteFeatures: a feature that is not finite; it names the first image of those.
        """
        import torch

        from flow_grpo.rewards.image_path import check_images

        check_images(images, "a feature extractor")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [self._unit_features(part) for part in images.split(self.batch_size)]
        features = torch.cat(parts).numpy()  # (B, d)
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise NonFiniteFeatures(
                f"the features of {self.name} are not finite, first those of image {finite.argmin()}."
            )
        return features

    def _unit_features(self, images: Tensor) -> Tensor:
        return self.differentiable(images.to(self.device)).cpu()

    def differentiable(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) on the device -> (B, d) float32 of unit length, in one batch, with their graph.

        Of an extractor that was loaded with `eight_bit`, the graph ends at the rounding.
        """
        import torch.nn.functional as F

        return F.normalize(self._encode(images.float()).float(), dim=-1)


def load_extractor(
    kind: str = "clip",
    model: str = DEFAULT_MODEL,
    pretrained: str = "",
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    eight_bit: bool = True,
) -> FeatureExtractor:
    """The features that `kind` (one of EXTRACTORS) computes with `model`.

    "clip" and "dinov2" take a directory or hub id of transformers, and no `pretrained`. "open_clip" takes

    - a model name that it knows, with `pretrained` a tag or a file of weights;
    - a .json file, that of a model or an open_clip_config.json, with `pretrained` a file of weights;
    - "hf-hub:org/name" or "local-dir:folder", which bring their weights: no `pretrained`.

    With `eight_bit` pixels are rounded as the libraries do; without it features have a gradient.

    Raises:
        ConfigError: one sentence on what is unknown, missing, damaged, out of reach, or of another architecture.
    """
    if kind not in EXTRACTORS:
        raise ConfigError(f"the features {kind!r} are unknown; there are {', '.join(EXTRACTORS)}.")
    encode = _LOADERS[kind](model, pretrained, device, eight_bit)
    name = ":".join(part for part in (kind, model, pretrained) if part)
    return FeatureExtractor(name, encode, device, batch_size)


def pixel_extractor(
    device: torch.device | str = "cpu", batch_size: int = 64, side: int = 8, eight_bit: bool = True
) -> FeatureExtractor:
    """Features without a network: the image at side x side pixels, minus grey; 3 side^2 of them, of unit length.

    They see colours and where they lie, nothing of what is shown: a red bag and a red coat in one place are alike. They
    are nobody's reward, and nobody's judge.
    """

    def encode(images: Tensor) -> Tensor:
        import torch.nn.functional as F

        pixels = (255 * images).round() / 255 if eight_bit else images
        return (F.adaptive_avg_pool2d(pixels, side) - 0.5).flatten(1)

    return FeatureExtractor(f"pixels:{side}x{side}", encode, device, batch_size)


# --- transformers ---------------------------------------------------------------------------------------------


def _load_clip(model: str, pretrained: str, device: torch.device | str, eight_bit: bool) -> Encode:
    _check_transformers("clip", model, pretrained)
    from flow_grpo.rewards.clip import ClipScorer

    with _one_sentence(f"{model!r} cannot be loaded as a CLIP"):
        scorer = ClipScorer(model, device)
    scorer.image_path = replace(scorer.image_path, eight_bit=eight_bit)
    return scorer.image_features


def _load_dinov2(model: str, pretrained: str, device: torch.device | str, eight_bit: bool) -> Encode:
    _check_transformers("dinov2", model, pretrained)
    from transformers import AutoConfig, AutoModel

    from flow_grpo.rewards.image_path import ImagePath

    source = find(model)
    with _one_sentence(f"{model!r} cannot be loaded as a DINOv2 with its image processor"):
        found = AutoConfig.from_pretrained(source).model_type
        if found not in DINOV2_TYPES:
            raise ConfigError(f"{model!r} is no DINOv2 but a {found!r}; it takes {' or '.join(DINOV2_TYPES)}.")
        image_path = replace(ImagePath.load(source), eight_bit=eight_bit)
        loaded: Any = AutoModel.from_pretrained(source, output_loading_info=True)
    network, info = loaded
    if info["missing_keys"]:  # the library has filled them with random numbers
        raise ConfigError(f"{model!r} is not a whole DINOv2; it lacks {', '.join(sorted(info['missing_keys']))}.")
    network = _frozen(network, device)
    return lambda images: network(pixel_values=image_path(images)).pooler_output


def _check_transformers(kind: str, model: str, pretrained: str) -> None:
    if pretrained:
        raise ConfigError(f"pretrained = {pretrained!r} is for open_clip; a {kind} model names its weights itself.")
    check_checkpoint(f"the {kind} model", model)


def _frozen(network: torch.nn.Module, device: torch.device | str) -> Any:
    return network.float().to(device).eval().requires_grad_(False)


# --- open_clip ------------------------------------------------------------------------------------------------


def _load_open_clip(model: str, pretrained: str, device: torch.device | str, eight_bit: bool) -> Encode:
    import open_clip

    from flow_grpo.rewards.image_path import ImagePath

    with _open_clip_source(model, pretrained) as (name, weights):
        tag = open_clip.get_pretrained_cfg(name, weights)
        with _one_sentence(f"open_clip cannot load {model!r} with pretrained = {pretrained!r}"):
            network = open_clip.create_model(
                name,
                weights,
                force_quick_gelu=bool(tag.get("quick_gelu")),  # as the weights were trained; the library only warns
                require_pretrained=True,
            )
    network = _frozen(network, device)
    image_path = ImagePath.from_open_clip(open_clip.get_model_preprocess_cfg(network), model)
    image_path = replace(image_path, eight_bit=eight_bit)
    return lambda images: network.encode_image(image_path(images))


@contextmanager
def _open_clip_source(model: str, pretrained: str) -> Iterator[tuple[str, str | None]]:
    """What open_clip is to be asked for: a name, with a tag or a file of weights where the name does not bring them."""
    if model.endswith(".json"):
        config = _read_open_clip_config(Path(find(model)))
        with tempfile.TemporaryDirectory() as folder:
            _write_directory(Path(folder), config, _weights_file(model, pretrained))
            yield DIRECTORY + folder, None
    elif model.startswith((HUB, DIRECTORY)):
        if pretrained:
            raise ConfigError(f"pretrained = {pretrained!r} is not for {model!r}, which brings its own weights.")
        yield model, None
    else:
        name = _known_name(model)
        yield name, _tag_or_file(name, pretrained)


def _read_open_clip_config(path: Path) -> dict[str, Any]:
    """An open_clip_config.json, or the configuration of a model alone -> the former."""
    config = read_json(path, "the open_clip configuration ")
    whole = config if isinstance(config, dict) and "model_cfg" in config else {"model_cfg": config}
    model = whole["model_cfg"]
    if not isinstance(model, dict) or not set(OPEN_CLIP_KEYS) <= set(model):
        raise ConfigError(f"{path} is no open_clip configuration; it needs {', '.join(OPEN_CLIP_KEYS)}.")
    return whole


def _write_directory(folder: Path, config: Mapping[str, Any], weights: Path) -> None:
    """The folder that open_clip reads as a model of its own: no name to clash with those it knows."""
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    safe = weights.suffix == ".safetensors"
    name = "open_clip_model.safetensors" if safe else "open_clip_pytorch_model.bin"  # .bin: whatever torch.load reads
    (folder / name).symlink_to(weights.resolve())


def _weights_file(model: str, pretrained: str) -> Path:
    path = Path(find(pretrained))
    if not pretrained or not path.is_file():
        raise ConfigError(f"pretrained = {pretrained!r} is not a file; {model!r} needs the file of its weights.")
    return path


def _known_name(model: str) -> str:
    import open_clip

    name, known = model.replace("/", "-"), open_clip.list_models()  # as open_clip spells them
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise ConfigError(
            f"open_clip knows no model {model!r}; the nearest are {', '.join(nearest)}; it also takes a .json file "
            f"of a configuration, {HUB}org/name or {DIRECTORY}folder."
        )
    return name


def _tag_or_file(name: str, pretrained: str) -> str:
    import open_clip

    if open_clip.is_pretrained_cfg(name, pretrained):
        return pretrained
    path = Path(find(pretrained))
    if not pretrained or not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(
            f"pretrained = {pretrained!r} is neither a file nor a tag of open_clip's {name} (its tags: {tags})."
        )
    return str(path)


@contextmanager
def _one_sentence(subject: str) -> Iterator[None]:
    """Turn what the libraries raise for files that are missing, damaged, or of something else into ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (*LOADING_ERRORS, LookupError, ArithmeticError, AssertionError, StopIteration) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        shown = reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]} ..."
        raise ConfigError(f"{subject}: {shown}") from error


# --- scenes ---------------------------------------------------------------------------------------------------


def _load_scenes(model: str, pretrained: str, device: torch.device | str, eight_bit: bool) -> Encode:
    """The features of a detector's four cells, side by side."""
    from flow_grpo.scenes.detector import CellDetector, split_cells

    if pretrained:
        raise ConfigError(f"pretrained = {pretrained!r} is for open_clip; a detector of scenes brings its own weights.")
    detector = CellDetector.load(model).to(device)

    def encode(images: Tensor) -> Tensor:
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            height, width = images.shape[-2:]
            raise ConfigError(f"{model!r} sees scenes of {RESOLUTION} x {RESOLUTION} pixels, not {height} x {width}.")
        pixels = (255 * images).round() / 255 if eight_bit else images
        return detector.features(2 * split_cells(pixels) - 1).unflatten(0, (-1, CELLS)).flatten(1)

    return encode


_LOADERS: dict[str, Callable[[str, str, Any, bool], Encode]] = {
    "clip": _load_clip,
    "dinov2": _load_dinov2,
    "open_clip": _load_open_clip,
    "scenes": _load_scenes,
}
EXTRACTORS = tuple(_LOADERS)
