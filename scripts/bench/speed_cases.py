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
    before: bool = False  # and with another commit, if one is asked for
    processes: int = 1


# Half the images of the recipes: five groups of eight. Nothing is compared with another number of images.
HALF = {"sample.groups_per_epoch": 5, "sample.batch_size": 40, "train.batch_size": 20}
CASES: Mapping[str, Case] = {
    "GRPO": Case(GRPO, HALF, compiled=True, upstream=True, before=True),
    "GRPO, compiled": Case(GRPO, {**HALF, "compile": "on"}, compiled=True, upstream=True),
    "GRPO, guided": Case(GRPO, {**HALF, "sample.guidance_scale": 4.5}, upstream=True, before=True),
    "GRPO, guided, compiled": Case(
        GRPO, {**HALF, "sample.guidance_scale": 4.5, "compile": "on"}, compiled=True, upstream=True
    ),
    "NFT": Case(NFT, HALF),
    "NFT, rollout in bf16": Case(NFT, {**HALF, "forward.rollout": "bf16"}),
    "DRTune, one pass": Case(DRTUNE, compiled=True, before=True),
    "DRTune, two passes": Case(DRTUNE, {"drtune.two_pass": True}, before=True),
    "anchored": Case(ANCHORED),
    "log-densities": Case(GRPO, {"entropy.num_probes": PROBES, "entropy.num_image_per_prompt": 8}, "entropy"),
    "evaluation": Case(GRPO, {"eval.num_image_per_prompt": 8}, "evaluation", compiled=True, before=True),
}
SCALES: Mapping[str, Case] = {
    **{f"GRPO, {n} steps": Case(GRPO, {**HALF, "sample.num_steps": n}) for n in (5, 20)},
    **{f"GRPO, batches of {n}": Case(GRPO, {**HALF, "sample.batch_size": n, "train.batch_size": n}) for n in (5, 10)},
    "GRPO, D = 64": Case(GRPO, {**HALF, "resolution": 16}),
    "GRPO, D = 1024": Case(GRPO, {**HALF, "resolution": 64, "sample.num_steps": 5}),
    "GRPO, 2 processes": Case(GRPO, {**HALF, "sample.groups_per_epoch": 10}, processes=2),
}
ALL: Mapping[str, Case] = {**CASES, **SCALES}
