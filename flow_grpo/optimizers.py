"""AdamW, its moments in float32 or in 8 bits, and those moments as a checkpoint names them.

8 bits are those of bitsandbytes (arXiv 2110.02861): each 256 consecutive values of a moment share a float32 `absmax`,
and a byte each says which of 256 fixed shares of it they are. Weights of fewer than 4096 values keep float32 moments.
torchao has such an optimizer, too, but compiles it for each shape of a weight, minutes on a CPU, and diffusers 0.42
cannot use torchao 0.18, which it says in every command.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor, nn

BLOCK = 256  # values that share an absmax
CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # what a byte means: the same for all weights, so it is not saved


def make_optimizer(parameters: Iterable[nn.Parameter], train: FrozenConfigDict, device: str) -> torch.optim.Optimizer:
    """`train.optimizer` of float32 parameters on a type of device, "cpu" or "cuda"."""
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }
    if train.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)  # its own kernels are fused
    fused = True if device == "cuda" else None  # one kernel instead of a dozen
    return torch.optim.AdamW(parameters, fused=fused, **options)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """All that its steps have changed, by the numbers of the parameters and the optimizer's own names; {} before any.

    float32 AdamW's names are step, exp_avg and exp_avg_sq; those of 8 bits step, state1, state2, absmax1 and absmax2.
    """
    found = {}
    for number, state in optimizer.state_dict()["state"].items():
        flat: dict[str, Any] = {}
        for name, value in state.items():
            flat |= value if isinstance(value, dict) else {name: value}  # bitsandbytes hides its own from FSDP1
        found[number] = {name: torch.as_tensor(value) for name, value in flat.items() if name not in CODES}
    return found


def set_moments(optimizer: torch.optim.Optimizer, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Of the same optimizer; its options stay as they are."""
    state: dict[int, dict[str, Any]] = {number: dict(found) for number, found in moments.items()}
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    if hasattr(inner, "name2qmap"):
        for found in state.values():
            found["step"] = int(found["step"])
            if "absmax1" in found:
                found |= {name: inner.name2qmap[code] for name, code in CODES.items()}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def moment_shape(moment: str, weight: torch.Size) -> torch.Size:
    """That of a moment which is not a single number, for a weight of that shape."""
    return torch.Size([-(-weight.numel() // BLOCK)]) if moment.startswith("absmax") else weight
