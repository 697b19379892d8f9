"""One optimizer step: anchor, average over processes, check, clip, step, average the weights.

Before an epoch's first: is the ratio 1?
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_grpo.errors import TrainingStopped
from flow_grpo.loops.forward_kl import accumulate_forward_kl
from flow_grpo.policy import Policy
from flow_grpo.runs.run import Run


def apply_update(policy: Policy, loss: Tensor, run: Run) -> dict[str, float]:
    """Apply the gradients that this update has accumulated in `policy.trainable`, and clear them. Collective.

    With `train.forward_kl` the gradient of that loss is added first.

    The gradients of N processes, each the mean over its share of the update's images, are averaged, so that the update
    is that of one process with all the images. A non-finite loss or gradient skips the update. The learning rate is
    that of the number of updates applied before: a skipped one does not move its schedule.

    Args:
        loss: scalar, this process's loss; decides with the gradients whether the update is finite.

    Returns:
        `loss`, `grad_norm` (before clipping), means over processes; `learning_rate`; `skipped_updates`, 0 or 1;
        `forward_kl`, without its weight, of this process.

    Raises:
        TrainingStopped: `train.max_nonfinite_updates` updates in a row were skipped.
    """
    train = policy.settings.config.train
    terms: dict[str, float] = {}
    if train.forward_kl > 0:
        anchor = accumulate_forward_kl(policy, run, train.forward_kl)
        loss, terms["forward_kl"] = loss + train.forward_kl * anchor, anchor.item()
    mean_loss = policy.weights.average(loss.detach())
    grad_norm = policy.weights.clip(train.max_grad_norm)
    finite = bool(torch.isfinite(mean_loss) and torch.isfinite(grad_norm))
    terms["learning_rate"] = policy.learning_rate(run.counters.updates)
    if finite:
        for group in policy.optimizer.param_groups:
            group["lr"] = terms["learning_rate"]
        policy.optimizer.step()
        _count_finite(policy, run)
    policy.optimizer.zero_grad()
    if not finite and not _scale_lowered(policy, mean_loss):
        _count_nonfinite(policy, run, mean_loss.item(), grad_norm.item())
    return terms | {"loss": mean_loss.item(), "grad_norm": grad_norm.item(), "skipped_updates": float(not finite)}


def _scale_lowered(policy: Policy, loss: Tensor) -> bool:
    """In fp16, answer an overflow by a lower loss scale; False once the scale is not the cause any more."""
    scaler = policy.accelerator.scaler
    if scaler is None:
        return False
    scaler.update()
    return bool(torch.isfinite(loss)) and scaler.get_scale() >= 1


def _count_finite(policy: Policy, run: Run) -> None:
    run.counters.updates += 1
    policy.skipped_in_a_row = 0
    if policy.ema is not None:
        policy.ema.step(policy.trainable)


def _count_nonfinite(policy: Policy, run: Run, loss: float, grad_norm: float) -> None:
    run.counters.nonfinite_updates += 1
    policy.skipped_in_a_row += 1
    if policy.skipped_in_a_row >= policy.settings.config.train.max_nonfinite_updates:
        raise TrainingStopped(
            f"{policy.skipped_in_a_row} updates in a row were skipped for a non-finite loss or gradient (last: loss "
            f"{loss}, gradient norm {grad_norm}); stopped after {run.counters.epoch} epochs, what is in "
            f"{run.folder} is intact"
        )


def check_ratio(policy: Policy, ratio_error: Tensor, bound: float, why: str) -> float:
    """Largest |ratio - 1| over all processes before an epoch's first update, where the weights are the sampling ones.

    Args:
        why: what the method's ratio is off by where it is, and what would work.

    Raises:
        TrainingStopped: it exceeds `bound`. A non-finite error is left to the update, which skips and counts it.
    """
    error = policy.accelerator.gather(ratio_error.reshape(1)).max().item()
    if error > bound:
        raise TrainingStopped(
            f"the ratio of unchanged weights is off by {error:.3g}, not within {bound:.3g} (config.train."
            f"max_ratio_error = {policy.settings.config.train.max_ratio_error}): {why}; what was saved is intact"
        )
    return error
