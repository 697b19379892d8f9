"""Trainings of a few epochs, and their checkpoints."""

from __future__ import annotations

from flow_grpo import places
from flow_grpo.methods.registry import method_of
from flow_grpo.runs.history import read_history
from flow_grpo.training import checkpoint
from flow_grpo.training.checkpoint import Score
from flow_grpo.training.trainer import fit


def train(config, build, method=None):
    """scripts/train/train_sd3.py without evaluators: fit, by a module's loop or the configuration's method."""
    parts = build(config)
    due = checkpoint.resume(parts.policy, parts.run, parts.settings)
    loop = places.load(method_of(parts.settings.config).loop) if method is None else method.train_epoch
    fit(parts.policy, loop, parts.prompts, parts.prompts, parts.reward, (), parts.settings, parts.run, due)
    return parts


def weights(parts):
    return [p.detach().clone() for p in parts.policy.trainable]


def deterministic(path):
    """A history without what depends on the machine."""
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.startswith("perf/")}
        for line in read_history(path / "metrics.jsonl")
    ]


def names(parts):
    return sorted(p.name for p in (parts.run.folder / "checkpoints").iterdir())


def save(parts, epoch=0, score=None):
    """The checkpoint of an epoch; whether it was written."""
    parts.run.counters.epoch = epoch
    return checkpoint.Saver(parts.policy, parts.run, parts.settings).save(
        None if score is None else Score("eval/judge/accuracy", score)
    )


def checkpoints(parts):
    return parts.run.folder / "checkpoints"
