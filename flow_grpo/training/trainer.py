"""The loop around an epoch: evaluate, train, log, save; the same for both methods."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flow_grpo.errors import ConfigError, Interrupted, RewardFailed, TrainingStopped
from flow_grpo.evaluators.evaluation import Evaluator, evaluate
from flow_grpo.page.build import build_page
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import ENDLESS
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.evaluations import copy_base
from flow_grpo.runs.folder import EVALUATIONS, PAGE_FILE, flatten, run_folder_of
from flow_grpo.runs.guards import FLOOR, Stop, base_diversity, early_stop, held_out, is_new_best
from flow_grpo.runs.history import deciding_metric
from flow_grpo.runs.resuming import is_over
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.training import words as training_words
from flow_grpo.training.checkpoint import Saver, Score, best_checkpoint, scores_of
from flow_grpo.training.performance import performance

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
    evaluation_due: bool = True,
) -> None:
    """Train until `num_epochs`, `max_seconds` or a guard, from wherever `run.counters` stand.

    Args:
        evaluation_due: whether the present weights are evaluated first; `checkpoint.resume` knows.

    Raises:
        TrainingStopped: as `train_epoch` does (the history then ends with `train/stopped`); or nothing can be written.
            Where it was a reward that failed, what the last finished epoch left is saved.
        Interrupted: the run was asked to stop, and what its last finished epoch left is saved.
    """
    config, counters = settings.config, run.counters
    saver = Saver(policy, run, settings)
    run.tell(training_words.begins(run.folder, settings.plan.images, any(e.freq for e in evaluators)))
    if any(e.freq for e in evaluators) and deciding_metric(flatten(config.to_dict()), "eval") is None:
        run.tell(training_words.UNDECIDED)
    _take_over_base(run)
    try:
        run.arm()
        saver.remember(evaluated=not evaluation_due)  # what a stop goes back to
        stop = _evaluate(policy, test_prompts, evaluators, settings, run, saver) if evaluation_due else None
        bar = run.progress(range(counters.epoch, config.num_epochs), "epochs", leave=True)
        limit = ""
        if config.max_seconds > 0:
            limit = f"/{config.max_seconds:.0f}"
        if config.max_seconds > 0 and config.num_epochs >= ENDLESS:  # the clock alone says how far the run is
            bar.total = None
        with bar:
            while stop is None and not is_over(config, counters.epoch, counters.seconds):
                metrics = _one_epoch(policy, train_epoch, prompts, reward, settings, run)
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward']:.4f}", seconds=f"{counters.seconds:.0f}{limit}")
                saver.remember(evaluated=False)
                stop = _evaluate(policy, test_prompts, evaluators, settings, run, saver)
    except Interrupted as stop:
        saved = saver.save_remembered()
        raise Interrupted(stop.reason, f"after epoch {counters.epoch}, {saved}") from None
    except RewardFailed as failure:
        if settings.num_processes > 1 and not failure.agreed:  # the others do not know of it
            raise
        raise TrainingStopped(f"{failure}; {saver.save_remembered()}") from failure
    finally:
        _show(run, live=False)


def _take_over_base(run: Run) -> None:
    """A run that branches off has the base model's records of the run that it comes from."""
    if not run.is_main or run.resumed or run.begins:
        return
    source = run_folder_of(run.settings.config.resume_from)
    try:
        with run.writing("the base model's record"):
            if source is not None:
                copy_base(source, run.folder)
    except ConfigError as error:
        run.tell(f"{str(error).rstrip('.')}: nothing is compared with the base model.")


def _show(run: Run, live: bool) -> None:
    """Write the run's page, `live` while it goes on; one that cannot be written is told once, and ends nothing."""
    if not (run.is_main and run.holds_folder() and (run.folder / EVALUATIONS).is_dir()):
        return
    try:
        build_page([run.folder], run.folder / PAGE_FILE, command=f"fme view {shlex.quote(str(run.folder))}", live=live)
    except (ConfigError, OSError) as error:
        run.tell(f"no page of {run.folder}: {str(error).rstrip('.')}; the run goes on.", key=PAGE_FILE)


def _evaluate(
    policy: Policy,
    prompts: PromptDataset,
    evaluators: Sequence[Evaluator],
    settings: Settings,
    run: Run,
    saver: Saver,
) -> Stop | None:
    """What is due after an epoch, or before the first: evaluation, then a checkpoint; why a guard ends the run."""
    config, counters = settings.config, run.counters
    run.check_stop()
    first, last = counters.epoch == 0, is_over(config, counters.epoch, counters.seconds)
    due = [e for e in evaluators if (e.freq > 0 if first else _due(e.freq, counters.epoch, last))]
    score = evaluate_weights(policy, prompts, due, settings, run)
    stop = _ask_guards(run) if due else None
    if stop is not None and stop.guard == FLOOR:
        score = None  # what is not diverse enough is not the best
    saver.remember(evaluated=True, score=score)  # before a stop: what was logged is not logged again
    last = last or stop is not None
    if due and not last:
        _show(run, live=True)
    run.check_stop(ended=last)
    if first and not last:
        return None
    new = last or saver.owed or counters.updates > saver.updates  # skipped updates leave the weights as they were
    if saver.owed or (new and (_due(config.save_freq, counters.epoch, last) or (bool(due) and _is_new_best(run)))):
        saver.save(score)
    if last and saver.owed:
        raise TrainingStopped(f"the last checkpoint could not be written; what was saved in {run.folder} is intact")
    if stop is not None and run.is_main:
        best = best_checkpoint(run)
        run.tell(training_words.stopped(counters.epoch, stop.why, best, _unbeaten_base(run, best)))
    return stop


def _ask_guards(run: Run) -> Stop | None:
    """Collective: why the run ends by the evaluation that it has just logged, the same on every process."""
    settings, epoch = flatten(run.settings.config.to_dict()), run.counters.epoch
    if settings[FLOOR] > 0 and epoch > 0 and run.is_main and base_diversity(run.folder, settings) is None:
        run.tell(training_words.UNKNOWN_BASE.format(diversity=settings["guard.diversity"]))
    return run.from_main(lambda: early_stop(run.folder, settings, epoch))


def _is_new_best(run: Run) -> bool:
    """Collective: see `is_new_best`."""
    settings = flatten(run.settings.config.to_dict())
    return run.from_main(lambda: is_new_best(run.folder, settings, run.counters.epoch))


def _unbeaten_base(run: Run, best: Path | None) -> float | None:
    """The base model's value of the held-out metric if the best checkpoint's is no higher; None: it is, or unknown."""
    values = dict(held_out(run.folder, flatten(run.settings.config.to_dict()), run.counters.epoch))
    if best is None or 0 not in values:
        return None
    score = scores_of([best])[best].value
    return values[0] if score <= values[0] else None


def _one_epoch(
    policy: Policy,
    train_epoch: TrainEpoch,
    prompts: PromptDataset,
    reward: WeightedReward,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Train one epoch and log it."""
    policy.network_evaluations = policy.trained_evaluations = 0
    images, seconds = run.counters.images, run.counters.seconds
    run.phase.begin()
    try:
        with run.timer():
            metrics = train_epoch(policy, prompts, reward, settings, run)
    except TrainingStopped:
        run.log({"train/stopped": 1.0}, run.counters.epoch)
        raise
    run.counters.epoch += 1
    run.counters.groups += settings.plan.groups
    run.counters.network_evaluations += policy.network_evaluations * settings.num_processes
    images, seconds = run.counters.images - images, run.counters.seconds - seconds
    measured = performance(policy, run.phase, images, seconds)
    run.log({f"train/{name}": value for name, value in metrics.items()} | measured, run.counters.epoch)
    if metrics.get("zero_std_fraction") == 1:
        run.tell(training_words.ALL_ALIKE.format(epoch=run.counters.epoch), key=training_words.ALL_ALIKE)
    return metrics


def evaluate_weights(
    policy: Policy, prompts: PromptDataset, evaluators: Sequence[Evaluator], settings: Settings, run: Run
) -> Score | None:
    """Evaluate the current weights and, if there are any, the averaged ones; log both, and say what was found.

    Returns:
        On the main process, what the best checkpoint is chosen by: see `score_of`.
    """
    if not evaluators:
        return None
    run.phase.begin()
    averaged = policy.ema is not None and settings.config.eval.ema
    with run.phase("evaluating"):
        current = evaluate(policy, prompts, evaluators, settings, run, "eval")
        metrics = dict(current.metrics)
        if averaged:
            with policy.ema_weights():
                metrics |= evaluate(policy, prompts, evaluators, settings, run, "eval_ema").metrics
    metrics["perf/seconds_evaluating"] = run.phase.seconds["evaluating"]
    if not run.is_main:
        return None
    run.log(metrics, run.counters.epoch)
    if current.record is not None and (said := training_words.evaluation(current.record)):
        run.tell(said)
    return score_of(metrics, settings, "eval_ema" if averaged else "eval")


def score_of(metrics: Mapping[str, float], settings: Settings, label: str) -> Score | None:
    """How good a checkpoint is, by `deciding_metric`; None if there is none, it was not measured or is not finite."""
    metric = deciding_metric(flatten(settings.config.to_dict()), label)
    value = None if metric is None else metrics.get(metric)
    return Score(str(metric), value) if value is not None and math.isfinite(value) else None


def _due(every: int, epoch: int, last: bool) -> bool:
    """Whether something done every so many epochs, and after the last, is due; 0: never."""
    return every > 0 and (last or epoch % every == 0)
