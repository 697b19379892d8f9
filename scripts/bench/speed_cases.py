"""What the speed bench times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GRPO, NFT, DRTUNE, ANCHORED = "tiny_grpo", "tiny_nft", "tiny_drtune", "tiny_anchored"
PROBES = 4  # of a log-density


@dataclass(frozen=True)
class Case:
    """An epoch of a recipe with changes, or something else of its policy."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    what: str = "epoch"  # or "evaluation", "entropy"
    compiled: bool = False  # compare with a compiled network, too
    upstream: bool = False  # and with upstream's order of calls
    processes: int = 1


HALF = {"sample.groups_per_epoch": 5}  # as many latents in a guided forward as without
CASES: Mapping[str, Case] = {
    "GRPO": Case(GRPO, compiled=True, upstream=True),
    "GRPO, guided": Case(GRPO, {**HALF, "sample.guidance_scale": 4.5}, compiled=True, upstream=True),
    "GRPO, compiled": Case(GRPO, {"compile": "on"}, compiled=True, upstream=True),
    "NFT": Case(NFT),
    "NFT, rollout in bf16": Case(NFT, {"forward.rollout": "bf16"}),
    "DRTune, one pass": Case(DRTUNE, compiled=True),
    "DRTune, two passes": Case(DRTUNE, {"drtune.two_pass": True}, compiled=True),
    "anchored": Case(ANCHORED, compiled=True),
    "log-densities": Case(GRPO, {"entropy.num_probes": PROBES}, "entropy"),
    "evaluation": Case(GRPO, {}, "evaluation", compiled=True),
}
SCALES: Mapping[str, Case] = {
    **{f"GRPO, {n} steps": Case(GRPO, {"sample.num_steps": n}) for n in (5, 20)},
    **{f"GRPO, batches of {n}": Case(GRPO, {"sample.batch_size": n, "train.batch_size": n}) for n in (10, 20)},
    "GRPO, D = 64": Case(GRPO, {"resolution": 16}),
    "GRPO, D = 1024": Case(GRPO, {**HALF, "resolution": 64}),
    "GRPO, 2 processes": Case(GRPO, processes=2),
}
ALL: Mapping[str, Case] = {**CASES, **SCALES}
