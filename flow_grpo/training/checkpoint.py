"""Checkpoints: what is needed to continue exactly, and the trained weights in the formats others load.

    checkpoints/checkpoint-000010/
        state.json                              counters, score, settings, what the weights belong to, plain numbers
        training_state.safetensors              trained weights, their average, the optimizer's moments
        lora/  lora_ema/                        adapter_config.json + adapter_model.safetensors: peft
                                                pytorch_lora_weights.safetensors: pipe.load_lora_weights
        transformer/  transformer_ema/          instead of lora/ in full fine-tuning: from_pretrained
        manifest.json                           size and SHA-256 of all these, written last

Random numbers are keyed (flow_grpo/randomness.py), so the counters are the whole state of every generator and sampler.
A checkpoint is written under another name, forced to the disk, and then renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json, sync_tree
from flow_grpo.models.files import first_line
from flow_grpo.policy import Policy
from flow_grpo.runs.folder import HISTORY_FILE
from flow_grpo.runs.history import digest_of_history
from flow_grpo.runs.manifest import write_manifest
from flow_grpo.runs.resuming import weights_record
from flow_grpo.runs.run import Run
from flow_grpo.runs.saved import (
    CHECKPOINT_STATE,
    CHECKPOINTS,
    FORMAT,
    TENSORS,
    checkpoint_damage,
    checkpoint_state,
    drop,
    finished_checkpoints,
    remove,
    replace_folder,
    set_aside,
)
from flow_grpo.settings import Settings
from flow_grpo.training.state import (
    AVERAGE,
    MOMENTS,
    OLD,
    WEIGHTS,
    TrainingState,
    collect,
    gathered,
    named_as,
    not_finite,
    read,
    restore,
)
from flow_grpo.training.words import go_on

TRAINED_ON = "/reward/total"  # end of the metric's name


@dataclass(frozen=True)
class Score:
    """What decides which checkpoint is the best: a metric of the evaluation, higher is better, not trained on."""

    metric: str
    value: float


# --- going on -------------------------------------------------------------------------------------------


def resume(policy: Policy, run: Run, settings: Settings) -> bool:
    """Continue from the run's checkpoint, if it has one; whether an evaluation of these weights is still due.

    In the same run folder, what was logged after that checkpoint is forgotten, and later checkpoints are set aside in
    checkpoints/abandoned/: they belong to a history that is now written anew.

    Raises:
        ConfigError: on every process, if the checkpoint does not fit the model.
    """
    if run.checkpoint is None:
        return True
    state = read(run.checkpoint)
    state = TrainingState(named_as(policy, state.tensors), state.plain, state.counters, state.evaluated)
    restore(policy, run, state, str(run.checkpoint))
    if "groups" not in state.counters:  # of before it was counted
        run.counters.groups = run.counters.epoch * settings.plan.groups
    if run.resumed:
        history = checkpoint_state(run.checkpoint).get("history")
        run.truncate_history(run.counters.epoch, evaluation_redone=not state.evaluated, expected=history)
        run.from_main(lambda: _set_aside_later(run))
    return not state.evaluated


def _set_aside_later(run: Run) -> None:
    """Move checkpoints of later epochs than the run's out of the way."""
    later = [f for epoch, f in finished_checkpoints(run.folder / CHECKPOINTS).items() if epoch > run.counters.epoch]
    for folder in later:
        set_aside(folder, "abandoned")
    if later:
        run.tell(f"{len(later)} checkpoints of later epochs are set aside in {later[0].parent / 'abandoned'}.")


# --- writing --------------------------------------------------------------------------------------------


class Saver:
    """Writes a run's checkpoints. What cannot be written now, such as on a full disk, is told and stays owed.

    Attributes:
        owed: whether the last attempt failed; the same on every process.
        updates: optimizer steps that the last checkpoint of this session holds; -1: there is none.
    """

    def __init__(self, policy: Policy, run: Run, settings: Settings) -> None:
        self.policy, self.run, self.settings = policy, run, settings
        self.owed = False
        self.updates = -1
        self._last: TrainingState | None = None  # what this process holds of it
        self._score: Score | None = None  # of that state
        self._best: str | None = None  # of the main process: name of the best checkpoint
        self._is_record = False  # of the main process: whether the last one is better than all before

    def remember(self, evaluated: bool, score: Score | None = None) -> None:
        """Keep a copy of what this process holds of the present state, from which `save_remembered` writes."""
        if not (self.run.is_main or self.policy.sharded):
            return  # the main process holds all of it
        self._score = score
        if self._last is not None and self._last.counters == self.run.counters.state_dict():
            self._last = replace(self._last, evaluated=evaluated)  # the weights are the same
        else:
            self._last = collect(self.policy, self.run, evaluated).to_cpu()

    def save(self, score: Score | None) -> bool:
        """Collective: write the checkpoint of the epochs completed so far, whole or not at all; whether it was written.

        Then those that are no longer kept are dropped. Weights that are not finite are not written.
        """
        state = gathered(self.policy, collect(self.policy, self.run, evaluated=True))
        problem = self.run.from_main(lambda: self._attempt(state, score))
        self.owed = problem is not None
        if problem is None:
            self.updates = self.run.counters.updates
            if score is not None and self._is_record:
                self.run.tell(f"{self._best} is the best so far: {score.metric} {score.value:.4f}.")
        else:
            self.run.tell(f"no checkpoint of epoch {self.run.counters.epoch}: {problem}.")
        return problem is None

    def save_remembered(self) -> str:
        """Collective: write what was remembered, unless it is saved already; the counters go back to it.

        Returns:
            what there is to go on from, in words, the same on every process.
        """
        if self._last is not None:
            self.run.counters.load_state_dict(self._last.counters)
        if self.run.from_main(self._holds_remembered):
            return self.run.from_main(self._whole)
        state = None if self._last is None else gathered(self.policy, self._last)
        return self.run.from_main(lambda: self._save(state))

    def _holds_remembered(self) -> bool:
        assert self._last is not None, "remember comes first"
        return _holds(checkpoint_folder(self.run), self._last)

    def _whole(self) -> str:
        return f"checkpoint {self.run.counters.epoch} is whole; {go_on(self.run.folder)}"

    def _save(self, state: TrainingState | None) -> str:
        run = self.run
        problem = self._attempt(state, self._score)
        if problem is None:
            return self._whole()
        saved = finished_checkpoints(run.folder / CHECKPOINTS)
        kept = f"{saved[max(saved)].name} is the newest" if saved else "there is none"
        return f"its checkpoint could not be written ({problem}): {kept}"

    def _attempt(self, state: TrainingState | None, score: Score | None) -> str | None:
        """Of the main process: write the checkpoint of a whole state; what is in the way, in words."""
        assert state is not None, "it is gathered on the main process"
        trained = {k: v for k, v in state.tensors.items() if not k.startswith((MOMENTS, OLD))}
        if broken := not_finite(trained):
            return f"{broken} is no longer finite"
        if not self.run.holds_folder():
            return f"{self.run.folder} is no longer the folder that this run began to write"
        folder = checkpoint_folder(self.run)
        partial = folder.with_name(f".partial-{folder.name}")
        try:
            folder.parent.mkdir(exist_ok=True)
            remove(partial)
            partial.mkdir()
            self._write(partial, state, score)
            replace_folder(partial, folder)
            self._drop_old(folder.parent)
        except (OSError, SafetensorError, ConfigError) as error:
            remove(partial)
            return f"{folder} cannot be written ({getattr(error, 'strerror', None) or first_line(error)})"
        return None

    def _write(self, folder: Path, state: TrainingState, score: Score | None) -> None:
        save_file(dict(state.tensors), folder / TENSORS)
        export(self.policy, folder, "", state.of(WEIGHTS))
        if self.policy.ema is not None:
            export(self.policy, folder, "_ema", state.of(AVERAGE))
        record = {
            "format": FORMAT,
            "counters": state.counters,
            "evaluated": state.evaluated,
            "score": None if score is None else score.value,
            "score_of": None if score is None else score.metric,
            "best": self._best_with(folder, score),
            "weights": weights_record(self.settings.config),
            "base_sha256": self._base_sha256(),
            "reward_sha256": self.run.reward_sha256,
            "plain": state.plain,
            "run_id": self.run.run_id,
            "history": digest_of_history(self.run.folder / HISTORY_FILE),
            "config": json.loads(strict_json(self.settings.config.to_dict() | {"run_name": self.run.name})),
        }
        (folder / CHECKPOINT_STATE).write_text(strict_json(record, indent=2), encoding="utf-8")
        sync_tree(folder)
        write_manifest(folder)

    def _base_sha256(self) -> str | None:
        """None, and a word, where the base model's folder has gone: the run does without it."""
        try:
            return self.run.base_sha256
        except ConfigError as error:
            self.run.tell(f"the base model's files have changed: {error}")
            return None

    def _best_with(self, partial: Path, score: Score | None) -> str | None:
        """The name of the best checkpoint once this one is there."""
        name = partial.name.removeprefix(".partial-")
        scores = scores_of([f for f in finished_checkpoints(partial.parent).values() if f.name != name])
        if score is not None:
            scores[partial.with_name(name)] = score
        before = [s.value for f, s in scores.items() if f.name != name and score and s.metric == score.metric]
        self._is_record = score is not None and all(score.value > value for value in before)
        best = best_of(scores)
        self._best = None if best is None else best.name
        return self._best

    def _drop_old(self, checkpoints: Path) -> None:
        """Keep the latest `num_checkpoint_limit` whole ones and the best; 0 keeps all. Damaged ones are left alone."""
        limit = self.settings.config.num_checkpoint_limit
        if limit == 0:
            return
        found = list(finished_checkpoints(checkpoints).values())
        whole = [folder for folder in found if checkpoint_damage(folder, deep=False) is None]
        for folder in set(found) - set(whole):
            self.run.tell(f"{folder} is damaged ({checkpoint_damage(folder, deep=False)}): it is left as it is.")
        keep = {*whole[-limit:], best_of(scores_of(whole))}
        for folder in whole:
            if folder not in keep:
                drop(folder)


def checkpoint_folder(run: Run) -> Path:
    """Of the epochs completed so far."""
    return run.folder / CHECKPOINTS / f"checkpoint-{run.counters.epoch:06d}"


def best_checkpoint(run: Run) -> Path | None:
    """The best so far of the run's whole checkpoints; None: none is called so."""
    return best_of(scores_of(list(finished_checkpoints(run.folder / CHECKPOINTS).values())))


def scores_of(checkpoints: Sequence[Path]) -> dict[Path, Score]:
    """The scores of those that were evaluated, oldest first; a damaged one has none.

    That of the reward trained on, by which runs of before chose, is none either.
    """
    scores = {}
    for folder in checkpoints:
        try:
            state = checkpoint_state(folder)
        except ConfigError:
            continue
        metric = str(state.get("score_of"))
        if isinstance(state.get("score"), float | int) and not metric.endswith(TRAINED_ON):
            scores[folder] = Score(metric, float(state["score"]))
    return scores


def best_of(scores: Mapping[Path, Score]) -> Path | None:
    """The highest score of the metric that the newest has; of equals, the newest."""
    if not scores:
        return None
    metric = list(scores.values())[-1].metric
    comparable = [folder for folder, score in scores.items() if score.metric == metric]
    return max(reversed(comparable), key=lambda folder: scores[folder].value)


def _holds(folder: Path, state: TrainingState) -> bool:
    """Whether a checkpoint of this very state is on disk, whole."""
    if checkpoint_damage(folder, deep=False) is not None:
        return False
    saved = checkpoint_state(folder)
    return saved["counters"] == state.counters and saved.get("evaluated") == state.evaluated


def export(policy: Policy, folder: Path, suffix: str, trained: dict[str, Tensor]) -> None:
    """Write trained weights, whole ones by their names, to `lora<suffix>/` in both formats, or `transformer<suffix>/`.

    The policy's own may be parts.
    """
    if not policy.settings.config.use_lora:
        whole: Any = policy.family.empty_transformer(policy.transformer.config)
        whole.load_state_dict(policy.transformer.state_dict() | trained, assign=True)
        whole.save_pretrained(folder / f"transformer{suffix}")
        return
    target = folder / f"lora{suffix}"
    adapter = policy.transformer.peft_config["default"]
    weights = get_peft_model_state_dict(policy.transformer, state_dict=trained)
    adapter.save_pretrained(target)
    save_file(
        {f"base_model.model.{name}": value for name, value in weights.items()}, target / "adapter_model.safetensors"
    )
    # The diffusers file has no place for alpha that every version reads: the factor alpha / r goes into B.
    scale = adapter.lora_alpha / adapter.r
    folded = {name: value * scale if ".lora_B." in name else value for name, value in weights.items()}
    policy.family.save_lora(target, folded)
