"""What an epoch is measured by beside its rewards: images a second, seconds by phase, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from flow_grpo.policy import Policy
from flow_grpo.runs.phases import Phases

# Dense matrix products in bfloat16, FLOPs a second, by what the device's name holds; from NVIDIA's data sheets.
PEAK_FLOPS: Mapping[str, float] = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "RTX 4090": 1.65e14,
}


def performance(policy: Policy, phases: Phases, images: int, seconds: float) -> dict[str, float]:
    """The metrics `perf/...` of an epoch, of the main process; `images` are those of all processes.

    `seconds_training` is what neither sampling nor scoring took: all of it where the gradient of a reward is followed,
    which does the three in one. `mfu`, the share of the GPU's peak that the network's own FLOPs make up, is left out
    where the peak is not known; activations that are computed again do not count.
    """
    parts = phases.seconds
    parts["training"] = max(seconds - sum(parts.values()), 0.0)
    found = {f"perf/seconds_{name}": value for name, value in parts.items()}
    found |= {"perf/images_per_second": images / seconds, "perf/peak_memory_gib": phases.peak_memory_gib()}
    peak = peak_flops(policy.device, policy.settings.config.mixed_precision)
    if policy.agreed(peak > 0):  # the network is run
        # a backward pass is a forward's worth of products with activations, and one with weights if they are trained
        backward = 1 if policy.settings.config.use_lora else 2
        used = (policy.network_evaluations + backward * policy.trained_evaluations) * flops_per_evaluation(policy)
        found["perf/mfu"] = used / seconds / peak
    return found


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOPs a second that a GPU can do at most; 0: not known."""
    if device.type != "cuda" or precision == "no":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0.0)


_FLOPS: WeakKeyDictionary[Policy, float] = WeakKeyDictionary()  # which does not keep a policy in memory


def flops_per_evaluation(policy: Policy) -> float:
    """Of one forward of the network with one image, as torch counts matrix products and attention; counted once."""
    if policy not in _FLOPS:
        _FLOPS[policy] = _counted_flops(policy)
    return _FLOPS[policy]


def _counted_flops(policy: Policy) -> float:
    embeds = policy.encode([""])
    x = torch.zeros(1, *policy.latent_shape, device=policy.device)
    before = policy.network_evaluations
    with torch.no_grad(), policy.eager(), FlopCounterMode(display=False) as counter:
        policy.velocity(embeds, 1.0)(x, 0.5)
    policy.network_evaluations = before
    return float(counter.get_total_flops())
