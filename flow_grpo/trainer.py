"""The loop around an epoch: evaluate, train, log, save; the same for both methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flow_grpo import checkpoint
from flow_grpo.errors import TrainingStopped
from flow_grpo.evaluation import Evaluator, evaluate
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards import WeightedReward
from flow_grpo.settings import Settings, is_over
from flow_grpo.tracking import Run

TrainEpoch = Callable[[Policy, PromptDataset, WeightedReward, Settings, Run], dict[str, float]]


def fit(
    policy: Policy,
    train_epoch: TrainEpoch,
    prompts: PromptDataset,
    test_prompts: PromptDataset,
    reward: WeightedReward,
    evaluators: Sequence[Evaluator],
    settings: Settings,
    run: Run,
) -> None:
    """Train until `num_epochs` or `max_seconds`, from wherever `run.counters` stand.

    Raises:
        TrainingStopped: as `train_epoch` does; the history then ends with `train/stopped`.
    """
    config, counters = settings.config, run.counters
    if counters.epoch == 0:
        evaluate_weights(policy, test_prompts, [e for e in evaluators if e.freq > 0], settings, run)
    epochs = run.progress(range(counters.epoch, config.num_epochs), "epochs", leave=True)
    limit = ""
    if config.max_seconds > 0:  # the clock, not the number of epochs, says how far the run is
        epochs.total, limit = None, f"/{config.max_seconds:.0f}"
    for _ in epochs:
        metrics = _one_epoch(policy, train_epoch, prompts, reward, settings, run)
        epochs.set_postfix(reward=f"{metrics['reward']:.4f}", seconds=f"{counters.seconds:.0f}{limit}")
        last = is_over(config, counters.epoch, counters.seconds)
        due = [e for e in evaluators if _due(e.freq, counters.epoch, last)]
        score = evaluate_weights(policy, test_prompts, due, settings, run)
        if _due(config.save_freq, counters.epoch, last) and policy.skipped_in_a_row == 0:  # not of broken weights
            checkpoint.save(policy, run, settings, score)
        if last and counters.epoch < config.num_epochs:  # the clock has stopped the run
            break
    epochs.close()


def _one_epoch(
    policy: Policy,
    train_epoch: TrainEpoch,
    prompts: PromptDataset,
    reward: WeightedReward,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Train one epoch and log it."""
    policy.network_evaluations = 0
    try:
        with run.timer():
            metrics = train_epoch(policy, prompts, reward, settings, run)
    except TrainingStopped:
        run.log({"train/stopped": 1.0}, run.counters.epoch)
        raise
    run.counters.epoch += 1
    run.counters.network_evaluations += policy.network_evaluations * settings.num_processes
    run.log({f"train/{name}": value for name, value in metrics.items()}, run.counters.epoch)
    return metrics


def evaluate_weights(
    policy: Policy, prompts: PromptDataset, evaluators: Sequence[Evaluator], settings: Settings, run: Run
) -> float | None:
    """Evaluate the current weights and, if there are any, the averaged ones; log both.

    Returns:
        On the main process `reward/total` of the averaged weights, or of the current ones without an average; None on
        other processes, if it was not measured, or if it is not finite.
    """
    if not evaluators:
        return None
    metrics = evaluate(policy, prompts, evaluators, settings, run, "eval")
    averaged = policy.ema is not None and settings.config.eval.ema
    if averaged:
        with policy.ema_weights():
            metrics |= evaluate(policy, prompts, evaluators, settings, run, "eval_ema")
    if not run.is_main:
        return None
    run.log(metrics, run.counters.epoch)
    score = metrics.get("eval_ema/reward/total" if averaged else "eval/reward/total")
    return score if score is not None and math.isfinite(score) else None


def _due(every: int, epoch: int, last: bool) -> bool:
    """Whether something done every so many epochs, and after the last, is due; 0: never."""
    return every > 0 and (last or epoch % every == 0)
