"""What a training says on the terminal besides its bars: when it begins, of each evaluation, and when it ends."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from flow_grpo.prompts import PromptDataset
from flow_grpo.runs.folder import PAGE_FILE
from flow_grpo.runs.record import Record

BEGINS = "{folder}: {images} images an epoch; watch {page}"
BEGINS_UNSEEN = "{folder}: {images} images an epoch; eval_freq is 0, so nothing is evaluated"
UNDECIDED = (
    "no judge and no held-out reward (eval.judge, eval.rewards): no best checkpoint is chosen, the latest are kept"
)
ALL_ALIKE = (
    "epoch {epoch}: the images of each prompt all have the same reward, from which nothing is learnt "
    "(train/zero_std_fraction counts such prompts)"
)
ENDS = "done: epoch {epochs}; the page is {page}"
ENDS_UNSEEN = "done: epoch {epochs}, in {folder}"  # nothing was evaluated
STOPPED = "ended early, after epoch {epoch}: {why}; {best}"
BEST, NO_BEST = "the best checkpoint is {path}", "no checkpoint is called the best"
NOT_BETTER = "no checkpoint is better than the base model, {value:.4f}"
UNKNOWN_BASE = "the base model's {diversity} is not known: guard.diversity_floor watches nothing"
UNREAD_NEGATIVES = (
    "the negative prompts in {path} are not read: without guidance ({key} = 1) there is nothing to lead away from"
)
NOT_SHARDED = 'config.sharding = "full" shares the weights among processes, and there is one: it holds them all'
GO_ON = "go on with `fme train --resume {folder}`"
BASE, EPOCH = "base model", "epoch {epoch}, {seconds:.0f} s"
REWARD, REWARD_CHANGE = "reward {reward:.4f}", " ({difference:+.4f} ± {half:.4f})"
DIFFERENT, DIFFERENT_BASE = "{vendi:.2f} different images of {n}", " (base {old:.2f})"
JUDGE, JUDGE_BASE = "judge {share:.0%}", " (base {old:.0%})"


def begins(folder: Path, images: int, evaluates: bool) -> str:
    """The first line; `images` of an epoch."""
    words = BEGINS if evaluates else BEGINS_UNSEEN
    return words.format(folder=folder, images=images, page=folder / PAGE_FILE)


def ends(folder: Path, epochs: int) -> str:
    """The last line."""
    words = ENDS if (folder / PAGE_FILE).is_file() else ENDS_UNSEEN
    return words.format(epochs=epochs, page=folder / PAGE_FILE, folder=folder)


def stopped(epoch: int, why: str, best: Path | None, unbeaten: float | None) -> str:
    """What a guard says that ends a run; `unbeaten`: the base model's value, where no checkpoint has a higher one."""
    words = NO_BEST if best is None else BEST.format(path=best)
    return STOPPED.format(epoch=epoch, why=why, best=words if unbeaten is None else NOT_BETTER.format(value=unbeaten))


def unread_negatives(config: FrozenConfigDict) -> str:
    """What is said of a file whose prompts have negative ones that nothing reads; empty: there is none."""
    for name, kind in (("train", "sample"), ("test", "eval")):
        path = config.prompts[name]
        if config[kind].guidance_scale == 1 and PromptDataset.load(path).negatives:
            return UNREAD_NEGATIVES.format(path=path, key=f"config.{kind}.guidance_scale")
    return ""


def not_sharded(config: FrozenConfigDict, num_processes: int) -> str:
    """What is said of sharding by one process; empty: there is none, or there are more."""
    return NOT_SHARDED if config.sharding == "full" and num_processes == 1 else ""


def go_on(folder: Path) -> str:
    """How a run that was stopped is gone on with."""
    return GO_ON.format(folder=shlex.quote(str(folder.resolve())))


def evaluation(record: Record) -> str:
    """What an evaluation found, as far as it was measured; empty where nothing was."""
    parts = [part for part in (_reward(record), _different(record), _judge(record)) if part]
    head = EPOCH.format(epoch=record.epoch, seconds=record.seconds) if record.epoch else BASE
    return f"{head}: {', '.join(parts)}" if parts else ""


def _reward(record: Record) -> str:
    values = [value for value in record.rewards.get("total", ()) if value is not None]
    if not values:
        return ""
    change = record.changes.get("reward")
    half = 0.0 if change is None else (change.high - change.low) / 2
    more = "" if change is None else REWARD_CHANGE.format(difference=change.difference, half=half)
    return REWARD.format(reward=np.mean(values)) + more


def _different(record: Record) -> str:
    if record.diversity is None:
        return ""
    change, found = record.changes.get("vendi"), record.diversity
    more = "" if change is None else DIFFERENT_BASE.format(old=change.old)
    return DIFFERENT.format(vendi=np.mean(found.vendi), n=round(np.mean(found.images))) + more


def _judge(record: Record) -> str:
    pairs = zip(record.judge.guess, record.prompt, strict=True) if record.judge else ()
    right = [guess == prompt for guess, prompt in pairs if guess is not None]
    if not right:
        return ""
    change = record.changes.get("judge")
    return JUDGE.format(share=np.mean(right)) + ("" if change is None else JUDGE_BASE.format(old=change.old))
