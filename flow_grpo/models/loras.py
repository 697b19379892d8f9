"""Load the LoRA of any trainer into a transformer, and say how much of it was loaded.

The libraries' loaders take a file whose keys they do not know without a word and load nothing. Here every layer of the
file finds its module or is counted as left out (flow_grpo/models/lora_places.py), and peft's layers do the arithmetic.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.models.lora_files import read_lora
from flow_grpo.models.lora_places import Placement, Plan, match, weight_matrices


@dataclass(frozen=True)
class Loaded:
    """How much of a LoRA is in the transformer now."""

    name: str  # of the file or folder
    adapter: str  # what peft calls it
    layers: int  # of the file, that were loaded
    of: int  # layers of the file
    text_encoder: int = 0  # layers left out, being a text encoder's
    unknown: tuple[str, ...] = ()  # names of layers, and other keys, that are no module's
    zero: bool = False  # every layer is 0: nothing is changed

    def __str__(self) -> str:
        left_out = [f"{self.text_encoder} of text encoders"] if self.text_encoder else []
        if self.unknown:
            left_out.append(f"{len(self.unknown)} unknown, first {self.unknown[0]}")
        without = f" (left out: {'; '.join(left_out)})" if left_out else ""
        same = ", every one of them 0: the model is unchanged" if self.zero else ""
        return f"{self.layers} of {self.of} layers loaded{without}{same}"


def load_lora(transformer: Any, path: str | Path) -> Loaded:
    """Add a LoRA to a transformer, besides those that it has; frozen, in float32.

    Args:
        path: a .safetensors file, or the folder of a LoRA.

    Raises:
        ConfigError: no layer of it is one of the transformer's, or it is damaged, or another model's.
    """
    path = Path(path)
    file = read_lora(path)
    plan = match(file, weight_matrices({name: tuple(p.shape) for name, p in transformer.named_parameters()}))
    parts = read_parts(plan)
    adapters = list(getattr(transformer, "peft_config", {}))
    adapter = next(name for n in range(len(adapters) + 1) if (name := f"lora_{n}") not in adapters)
    with warnings.catch_warnings():  # several adapters are what is meant
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(_peft_config(plan, parts), adapter)
    for placement in plan.placements:
        _fill(transformer.get_submodule(placement.target.module), adapter, parts[placement.target.module])
    transformer.set_adapter([*adapters, adapter])
    transformer.requires_grad_(False)
    found = sum(adapter in getattr(module, "lora_A", {}) for module in transformer.modules())
    if found != len(plan.placements):
        raise RuntimeError(f"peft made {found} layers of {len(plan.placements)}")  # a fault of ours, not of the file
    zero = not any(_changes(part) for part in parts.values())
    return Loaded(path.name, adapter, plan.layers, len(file.layers), len(plan.text_encoder), plan.unknown, zero)


def merge_lora(transformer: Any, path: str | Path) -> Loaded:
    """Add a LoRA to the weights themselves, in their own dtype, of a transformer that has none; raises as `load_lora`.

    Below float32 the sum is rounded, as by diffusers' `fuse_lora`.
    """
    loaded = load_lora(transformer, path)
    transformer.fuse_lora()
    transformer.unload_lora()
    return loaded


def _changes(part: Parts) -> bool:
    """Whether a module's output can differ with it."""
    return bool(part.scale and part.a.any() and part.b.any()) or part.magnitude is not None or part.bias is not None


@dataclass(frozen=True)
class Parts:
    """What one module gets, in float32."""

    a: Tensor  # (r, in) or (r, in, k, k)
    b: Tensor  # (out, r) or (out, r, 1, 1)
    scale: float
    magnitude: Tensor | None = None  # (out,)
    bias: Tensor | None = None  # (out,)


def read_parts(plan: Plan) -> dict[str, Parts]:
    """Module -> its tensors.

    Raises:
        ConfigError: a tensor holds what is no finite number.
    """
    with safe_open(plan.file.path, framework="pt") as opened:
        return {placement.target.module: _parts(opened, plan, placement) for placement in plan.placements}


def _parts(opened: Any, plan: Plan, placement: Placement) -> Parts:
    layer = placement.layer
    tensors: dict[str, Tensor] = {part: opened.get_tensor(key) for part, key in layer.keys.items()}
    for part, value in tensors.items():
        if not value.is_floating_point() and part != "alpha":
            raise ConfigError(f"{plan.file.path}: {layer.keys[part]} is of {value.dtype}; it takes floating point.")
        tensors[part] = value.float()
        if not tensors[part].isfinite().all():
            raise ConfigError(f"{plan.file.path}: {layer.keys[part]} holds numbers that are not finite.")
    scale = placement.scale
    if scale is None:
        if tensors["alpha"].numel() != 1:
            raise ConfigError(f"{plan.file.path}: {layer.keys['alpha']} is not one number.")
        scale = tensors["alpha"].item() / layer.rank
    rows = {name: _rows(tensors[name].reshape(-1), placement) for name in ("magnitude", "bias") if name in tensors}
    return Parts(tensors["A"], _rows(tensors["B"], placement), scale, rows.get("magnitude"), rows.get("bias"))


def _rows(value: Tensor, placement: Placement) -> Tensor:
    """The module's own among the rows of the file's layer, in its order."""
    chunks = value.chunk(placement.target.of)
    return torch.cat([chunks[i] for i in placement.target.chunks])


def _peft_config(plan: Plan, parts: Mapping[str, Parts]) -> LoraConfig:
    """A layer for each module, of its own rank and alpha = scale * rank."""
    ranks = {f"^{re.escape(module)}": len(part.a) for module, part in parts.items()}
    alphas: dict[str, Any] = {f"^{re.escape(module)}": part.scale * len(part.a) for module, part in parts.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules="|".join(re.escape(module) for module in parts),  # as text, a pattern of whole names
        use_dora=any(part.magnitude is not None for part in parts.values()),
        lora_bias=any(part.bias is not None for part in parts.values()),
        init_lora_weights=False,
    )


@torch.no_grad()
def _fill(module: Any, adapter: str, parts: Parts) -> None:
    """Put a module's tensors in peft's layer, in float32 whatever the dtype of the weight."""
    device = module.get_base_layer().weight.device
    _set(module.lora_A[adapter].weight, parts.a, device)
    _set(module.lora_B[adapter].weight, parts.b, device)
    if module.lora_B[adapter].bias is not None:
        _set(module.lora_B[adapter].bias, torch.zeros(len(parts.b)) if parts.bias is None else parts.bias, device)
    if parts.magnitude is not None:
        _set(module.lora_magnitude_vector[adapter].weight, parts.magnitude, device)


def _set(parameter: torch.nn.Parameter, value: Tensor, device: torch.device) -> None:
    parameter.data = value.reshape(parameter.shape).to(device)
