"""Which layers of a transformer the layers of a LoRA's file mean, and at what scale.

Files may name them as diffusers or as the family's own code does (joint_blocks.0.x_block.attn.qkv, which is three of
diffusers'): see models/original_names.py.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.models.lora_files import FORMATS, Layer, LoraFile, read_header
from flow_grpo.models.original_names import Target, original_names

PREFIXES = re.compile(r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|module\.)")
FLAT_PREFIXES = re.compile(r"^(?:lora_unet_|lora_transformer_|lycoris_)")
TEXT_ENCODER = re.compile(r"^(?:base_model\.model\.)?(?:text_encoder|text_model|te\d|lora_te|clip_[lg]|t5xxl)")


@dataclass(frozen=True)
class Placement:
    """One module, and what it gets."""

    layer: Layer
    target: Target
    scale: float | None  # alpha / rank; None: alpha is a tensor of the file


@dataclass(frozen=True)
class Plan:
    """Which of a file's layers go where in one transformer."""

    file: LoraFile
    placements: tuple[Placement, ...]
    text_encoder: tuple[str, ...] = ()  # names of layers that are left out, being a text encoder's
    unknown: tuple[str, ...] = field(default=())  # names of layers, and other keys, that are no module's

    @property
    def layers(self) -> int:
        """Of the file, that have a place."""
        return len({placement.layer.name for placement in self.placements})


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight, from the files of a pipeline's transformer; {}: they are of another kind."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        shapes |= read_header(path)[0]
    return weight_matrices(shapes)


def check_lora_targets(modules: Iterable[str], targets: Sequence[str]) -> None:
    """ConfigError for the first target that is the end of no module's name."""
    known = list(modules)
    ends = {".".join(name.split(".")[2:]) or name for name in known if name}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            nearest = " or ".join(difflib.get_close_matches(target, sorted(ends), n=2, cutoff=0.0))
            raise ConfigError(
                f"config.lora.target_modules: {target!r} is the end of no module's name; the nearest are {nearest}."
            )


def modules_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The modules with weights, and those that they lie in."""
    parts = [name.split(".") for name in shapes]
    return sorted({".".join(part[: end + 1]) for part in parts for end in range(len(part))})


def weight_matrices(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Module -> shape, of the parameters that are the weights of linear maps and convolutions."""
    names = {name: shape for name, shape in parameters.items() if name.endswith(".weight") and ".lora_" not in name}
    return {
        name.removesuffix(".weight").removesuffix(".base_layer"): shape
        for name, shape in names.items()
        if len(shape) >= 2
    }


def match(file: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Find each layer's module among those of a transformer.

    Args:
        shapes: `transformer_shapes` or `weight_matrices`.

    Raises:
        ConfigError: no layer has a module, or one has other shapes: it is another model's; two are one module's; or its
            settings and its tensors disagree.
    """
    known = _spellings(shapes)
    placements: list[Placement] = []
    others: dict[bool, list[str]] = {True: [], False: list(file.strays)}
    for layer in file.layers:
        targets = known.get(_plain(layer.name), ())
        if not targets:
            others[bool(TEXT_ENCODER.match(layer.name))].append(layer.name)
        for target in targets:
            _check_shapes(file, layer, target, shapes[target.module])
            placements.append(Placement(layer, target, _scale(file, layer, target)))
    _check_plan(file, placements)
    return Plan(file, tuple(placements), tuple(others[True]), tuple(others[False]))


def _plain(name: str) -> str:
    """A layer's name without what trainers put before it, old attention processors' spelling undone."""
    name = FLAT_PREFIXES.sub("", name)
    while match := PREFIXES.match(name):
        name = name[match.end() :]
    return name.replace(".processor.", ".")


def _spellings(modules: Collection[str]) -> dict[str, tuple[Target, ...]]:
    """What files may call a module, or several at once: with dots or, as kohya does, underscores.

    Underscored names that two modules share are nobody's.
    """
    dotted: dict[str, list[Target]] = {module: [Target(module)] for module in modules}
    dotted |= {module.removesuffix(".0"): [Target(module)] for module in modules if module.endswith(".to_out.0")}
    for name, target in original_names(modules):
        dotted.setdefault(name, []).append(target)
    flat: dict[str, list[list[Target]]] = {}
    for name, targets in dotted.items():
        flat.setdefault(name.replace(".", "_"), []).append(targets)
    unique = {name: tuple(found[0]) for name, found in flat.items() if len(found) == 1}
    return unique | {name: tuple(targets) for name, targets in dotted.items()}


def _check_shapes(file: LoraFile, layer: Layer, target: Target, weight: tuple[int, ...]) -> None:
    """The layer's matrices are of this weight: (out, in) or (out, in, k, k)."""
    a, b = layer.shapes["A"], layer.shapes["B"]
    rows = weight[0] * target.of // len(target.chunks)
    if a[1:] != weight[1:] or b[0] != rows or math.prod(b[2:]) != 1:
        raise ConfigError(
            f"{file.path} is the LoRA of another model: its {layer.name} has A {a} and B {b}, but the weight of "
            f"{target.module} here is {weight}."
        )
    magnitude = layer.shapes.get("magnitude", (rows,))
    if math.prod(magnitude) != rows or (len(magnitude) == 2 and magnitude[0] != rows):
        raise ConfigError(
            f"{file.path}: the magnitude of its layer {layer.name} has shape {magnitude}; it takes one number for each "
            f"of the {rows} outputs."
        )


def _scale(file: LoraFile, layer: Layer, target: Target) -> float | None:
    """Alpha / rank, or alpha / sqrt(rank) if the settings say so; 1 where nothing says."""
    if "alpha" in layer.keys:
        return None
    settings = file.settings
    names = (layer.name, target.module)  # patterns are of the names that the trainer saw, which the file has
    rank = _of_module(settings, "rank_pattern", settings.get("r"), names)
    if rank is not None and rank != layer.rank:
        raise ConfigError(
            f"{file.path}: its settings give {target.module} the rank {rank}, but A has shape {layer.shapes['A']}."
        )
    alpha = _of_module(settings, "alpha_pattern", settings.get("lora_alpha"), names)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(layer.rank) if settings.get("use_rslora") else layer.rank)


def _of_module(settings: Mapping[str, Any], key: str, default: float | None, names: Sequence[str]) -> float | None:
    """What a pattern of the settings says of a module: the first that is the end of its name, as peft reads it.

    `names`: those that the module goes by, first the file's own.
    """
    for name in names:
        for pattern, value in (settings.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
    return default


def _check_plan(file: LoraFile, placements: list[Placement]) -> None:
    if not placements:
        first = next(iter(file.layers[0].keys.values()))
        raise ConfigError(
            f"{file.path}: none of its {len(file.layers)} layers is one of this transformer's (the first key is "
            f"{first!r}); known are the keys of {FORMATS}."
        )
    seen: dict[str, str] = {}
    for placement in placements:
        module, name = placement.target.module, placement.layer.name
        if module in seen:
            raise ConfigError(f"{file.path} has two layers for {module}: {seen[module]} and {name}.")
        seen[module] = name
    with_magnitude = ["magnitude" in placement.layer.keys for placement in placements]
    if any(with_magnitude) != all(with_magnitude) or (file.settings.get("use_dora") and not any(with_magnitude)):
        missing = placements[with_magnitude.index(False)].layer.name
        raise ConfigError(f"{file.path} is a DoRA that is not whole: its layer {missing} has no magnitude.")
