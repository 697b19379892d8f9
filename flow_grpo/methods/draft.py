"""DRaFT (arXiv 2309.17400) and AlignProp (arXiv 2310.03739): the settings they take.

Their loop is flow_grpo/loops/draft.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.methods.base import BLACK_BOX_ONLY, Method
from flow_grpo.methods.drtune import check_attached, check_trained_steps
from flow_grpo.rules import Key, whole

KEYS = (Key("draft.copies", 2, whole(1), "copies of the image that are noised again, whose gradients are averaged"),)


def check_draft_k(config: ConfigDict) -> None:
    """ConfigError for what only detached steps can do, and for more trained steps than there are."""
    check_attached(config, "draft_k")
    check_trained_steps(config)


def check_draft_lv(config: ConfigDict) -> None:
    """ConfigError for what only a detached chain can do."""
    check_attached(config, "draft_lv")


def check_alignprop(config: ConfigDict) -> None:
    """ConfigError for what only detached steps can do."""
    check_attached(config, "alignprop")


def tiny_draft_k(config: ConfigDict) -> None:
    """DRaFT-K on the embedded tiny SD3: full back-propagation through the last 2 of 10 steps.

    arXiv 2309.17400. Each trained step runs again in the backward pass, and is counted as training twice.
    Cost of an epoch, on 1 process: 40 images; 320 sampling, 160 training, 0 reference.
    """
    config.drtune.num_train_steps = 2
    config.train.learning_rate = 3e-3


def sd35_draft_k(config: ConfigDict) -> None:
    """DRaFT-K on SD3.5-medium at 256 pixels, on one GPU: full back-propagation through the last 2 of 10 steps.

    arXiv 2309.17400. Each trained step runs again in the backward pass, and is counted as training twice.
    Cost of an epoch, on 1 process: 48 images; 768 sampling, 384 training, 192 reference.
    """
    config.drtune.num_train_steps = 2
    config.drtune.two_pass = False


def tiny_draft_lv(config: ConfigDict) -> None:
    """DRaFT-LV on the embedded tiny SD3: the last of 10 steps, averaged over 2 copies noised again.

    arXiv 2309.17400.
    Cost of an epoch, on 1 process: 40 images; 400 sampling, 80 training, 0 reference.
    """
    config.train.learning_rate = 3e-3


def sd35_draft_lv(config: ConfigDict) -> None:
    """DRaFT-LV on SD3.5-medium at 256 pixels, on one GPU: the last of 10 steps, averaged over 2 copies noised again.

    arXiv 2309.17400.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 192 training, 192 reference.
    """
    config.drtune.two_pass = False


def tiny_alignprop(config: ConfigDict) -> None:
    """AlignProp on the embedded tiny SD3: full back-propagation from a step on that is drawn among all 10.

    arXiv 2310.03739. Each trained step runs again in the backward pass; on average 5.5 are trained, at most 10.
    Cost of an epoch, on 1 process: 40 images; 180 sampling, 440 training, 0 reference.
    """
    config.train.learning_rate = 3e-3


def sd35_alignprop(config: ConfigDict) -> None:
    """AlignProp on SD3.5-medium at 256 pixels, on one GPU: full back-propagation from a step on that is drawn.

    arXiv 2310.03739. Each trained step runs again in the backward pass; on average 5.5 are trained, at most 10.
    Cost of an epoch, on 1 process: 48 images; 432 sampling, 1,056 training, 528 reference.
    """
    config.drtune.two_pass = False


DRAFT_K = Method(
    "draft_k", "DRaFT-K", True, check_draft_k, "flow_grpo.loops.draft:train_epoch_draft_k",
    tiny=tiny_draft_k, sd35=sd35_draft_k, unread=BLACK_BOX_ONLY,
)  # fmt: skip
DRAFT_LV = Method(
    "draft_lv", "DRaFT-LV", True, check_draft_lv, "flow_grpo.loops.draft:train_epoch_draft_lv",
    keys=KEYS, tiny=tiny_draft_lv, sd35=sd35_draft_lv,
    unread=(*BLACK_BOX_ONLY, "drtune.num_train_steps"),
)  # fmt: skip
ALIGNPROP = Method(
    "alignprop", "AlignProp", True, check_alignprop, "flow_grpo.loops.draft:train_epoch_alignprop",
    tiny=tiny_alignprop, sd35=sd35_alignprop,
    unread=(*BLACK_BOX_ONLY, "drtune.num_train_steps"),
)  # fmt: skip
