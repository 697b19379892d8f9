"""Random LoRAs, and files of them as trainers write them: for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn2.to_v",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "proj_out",
)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """B A alpha / rank, and a magnitude for DoRA."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    alpha: float
    magnitude: Tensor | None = None  # (out,)

    def apply(self, weight: Tensor) -> Tensor:
        """The weight that it means, in float64."""
        new = weight.double() + self.b.double() @ self.a.double() * (self.alpha / len(self.a))
        if self.magnitude is None:
            return new
        return self.magnitude.double()[:, None] * new / new.norm(dim=1, keepdim=True)


Lora = Mapping[str, Layer]


def random_lora(
    transformer,
    rank: int | Callable[[int], int] = 4,
    alpha: float = 6.0,
    dora: bool = False,
    modules: Sequence[str] = MODULES,
) -> Lora:
    """Of `modules`; `rank` may depend on the number of the module, and alpha is the same for all."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number, name in enumerate(modules):
        out, width = transformer.get_submodule(name).weight.shape
        r = rank(number) if callable(rank) else rank
        a = 0.2 * torch.randn(r, width, generator=generator)
        b = 0.2 * torch.randn(out, r, generator=generator)
        magnitude = 1 + torch.rand(out, generator=generator) if dora else None
        found[name] = Layer(a, b, alpha, magnitude)
    return found


@torch.no_grad()
def merge(transformer, lora: Lora) -> None:
    """Change the weights themselves."""
    for name, layer in lora.items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(layer.apply(weight))


def without_alpha(lora: Lora) -> Lora:
    """The same, its alphas ignored."""
    return {name: replace(layer, alpha=float(len(layer.a))) for name, layer in lora.items()}


def keyed(lora: Lora, key: Callable[[str, str], str], names: tuple[str, str] = ("lora_A", "lora_B")) -> Tensors:
    """The matrices A and B under `key(module, matrix)`."""
    return {
        key(name, matrix): value
        for name, layer in lora.items()
        for matrix, value in zip(names, (layer.a, layer.b), strict=True)
    }


def save(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file of somebody's name."""
    path = folder / "somebodys.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def stock_diffusers(folder: Path, lora: Lora) -> Path:
    """A file by diffusers' own writer, with the settings in its header."""
    config = LoraConfig(r=4, lora_alpha=next(iter(lora.values())).alpha, target_modules=list(lora))
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=keyed(lora, lambda name, matrix: f"{name}.{matrix}.weight"),
        transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": list(lora)},
    )
    return folder


def stock_peft(folder: Path, transformer, lora: Lora, **settings) -> Path:
    """A folder by peft's own writer; changes the transformer."""
    ranks = {f"^{name}": len(layer.a) for name, layer in lora.items()}
    dora = next(iter(lora.values())).magnitude is not None
    alpha = next(iter(lora.values())).alpha
    config = LoraConfig(r=4, lora_alpha=alpha, rank_pattern=ranks, target_modules=list(lora), use_dora=dora, **settings)
    model = get_peft_model(transformer, config)
    with torch.no_grad():
        for name, layer in lora.items():
            module = model.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.copy_(layer.a)
            module.lora_B["default"].weight.copy_(layer.b)
            if dora:
                module.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    model.save_pretrained(folder)
    return folder


def kohya(folder: Path, lora: Lora, prefix: str = "lora_unet_", dora: bool = False) -> Path:
    """Underscores, down and up, an alpha for each layer."""
    flat = {name: prefix + name.replace(".", "_") for name in lora}
    tensors = keyed(lora, lambda name, matrix: f"{flat[name]}.{matrix}.weight", ("lora_down", "lora_up"))
    tensors |= {f"{flat[name]}.alpha": torch.tensor(layer.alpha) for name, layer in lora.items()}
    if dora:
        tensors |= {f"{flat[name]}.dora_scale": layer.magnitude[:, None] for name, layer in lora.items()}
    return save(folder, tensors)
