"""Checkpoints: what is needed to continue exactly, and the trained weights in the formats others load.

    checkpoints/checkpoint-000010/
        state.json                              counters, evaluation score, what the weights belong to
        training_state.pt                       trained weights, their average, optimizer
        lora/  lora_ema/                        adapter_config.json + adapter_model.safetensors: peft
                                                pytorch_lora_weights.safetensors: pipe.load_lora_weights
        transformer/  transformer_ema/          instead of lora/ in full fine-tuning: from_pretrained

Random numbers are keyed (flow_grpo/randomness.py), so the counters are the whole state of every generator and sampler.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from flow_grpo.policy import Policy
from flow_grpo.settings import (
    CHECKPOINT_STATE,
    TRAINING_STATE,
    Settings,
    find_checkpoint,
    finished_checkpoints,
    weights_record,
)
from flow_grpo.tracking import Run


def save(policy: Policy, run: Run, settings: Settings, score: float | None) -> None:
    """Write the checkpoint of the epochs completed so far, whole or not at all; then drop those no longer kept.

    Args:
        score: the evaluation's `reward/total` at this epoch, which decides the best; None: not evaluated.
    """
    if run.is_main:
        folder = run.folder / "checkpoints" / f"checkpoint-{run.counters.epoch:06d}"
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(policy, run, settings, score, partial)
        _replace(partial, folder)
        _drop_old(folder.parent, settings.config.num_checkpoint_limit)
    policy.accelerator.wait_for_everyone()


def load(policy: Policy, run: Run, folder: Path) -> None:
    """Set the policy and the run's counters to a checkpoint, which `settings.resolve` has found to fit."""
    state = json.loads((folder / CHECKPOINT_STATE).read_text())
    saved = torch.load(folder / TRAINING_STATE, map_location=policy.device, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(policy.trainable, saved["trainable"], strict=True):
            parameter.copy_(value)
    _load_optimizer(policy, saved["optimizer"])
    if policy.ema is not None:
        policy.ema.load_state_dict(saved["ema"] | {"decay": policy.ema.decay})
    if policy.accelerator.scaler is not None:
        policy.accelerator.scaler.load_state_dict(saved["scaler"])
    run.counters.load_state_dict(state["counters"])


def _load_optimizer(policy: Policy, saved: dict[str, Any]) -> None:
    """Load the optimizer's moments; learning rate and the like stay those of the present configuration."""
    configured = [{k: v for k, v in group.items() if k != "params"} for group in policy.optimizer.param_groups]
    policy.optimizer.load_state_dict(saved)
    for group, values in zip(policy.optimizer.param_groups, configured, strict=True):
        group.update(values)


def _set_aside_later(run: Run) -> None:
    """Move checkpoints of later epochs than the run's out of the way."""
    if not run.is_main:
        return
    for epoch, folder in finished_checkpoints(run.folder / "checkpoints").items():
        if epoch > run.counters.epoch:
            target = folder.parent / "abandoned" / folder.name
            target.parent.mkdir(exist_ok=True)
            _replace(folder, target)


def resume(policy: Policy, run: Run, settings: Settings) -> None:
    """Continue from `config.resume_from`, if it is given.

    In the same run folder, what was logged after that checkpoint is forgotten, and later checkpoints are set aside in
    checkpoints/abandoned/: they belong to a history that is now written anew.
    """
    if not settings.config.resume_from:
        return
    load(policy, run, find_checkpoint(settings.config.resume_from))
    if run.resumed:
        run.truncate_history(run.counters.epoch, evaluation_redone=False)
        _set_aside_later(run)


# --- writing -------------------------------------------------------------------------------------------


def _write(policy: Policy, run: Run, settings: Settings, score: float | None, folder: Path) -> None:
    scaler = policy.accelerator.scaler
    training_state = {
        "trainable": [parameter.detach() for parameter in policy.trainable],
        "optimizer": policy.optimizer.state_dict(),
        "ema": None if policy.ema is None else policy.ema.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    torch.save(training_state, folder / TRAINING_STATE)
    export(policy, folder, "")
    if policy.ema is not None:
        with policy.ema_weights():
            export(policy, folder, "_ema")
    state = {"counters": run.counters.state_dict(), "score": score, "weights": weights_record(settings.config)}
    (folder / CHECKPOINT_STATE).write_text(json.dumps(state, indent=2))


def export(policy: Policy, folder: Path, suffix: str) -> None:
    """Write the current weights to `lora<suffix>/` in both formats, or to `transformer<suffix>/`."""
    if not policy.settings.config.use_lora:
        policy.transformer.save_pretrained(folder / f"transformer{suffix}")
        return
    target = folder / f"lora{suffix}"
    adapter = policy.transformer.peft_config["default"]
    weights = {name: value.detach().cpu() for name, value in get_peft_model_state_dict(policy.transformer).items()}
    adapter.save_pretrained(target)
    save_file(
        {f"base_model.model.{name}": value for name, value in weights.items()}, target / "adapter_model.safetensors"
    )
    # The diffusers file has no place for alpha that every version reads: the factor alpha / r goes into B.
    scale = adapter.lora_alpha / adapter.r
    folded = {name: value * scale if ".lora_B." in name else value for name, value in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(target, transformer_lora_layers=folded)


def _replace(partial: Path, folder: Path) -> None:
    """Put a complete folder in its place; one that was there before goes only once the new one stands."""
    stale = folder.with_name(f".stale-{folder.name}")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        os.replace(folder, stale)
    os.replace(partial, folder)
    shutil.rmtree(stale, ignore_errors=True)


def _drop_old(checkpoints: Path, limit: int) -> None:
    """Keep the `limit` latest and the one with the best score; 0 keeps all."""
    found = list(finished_checkpoints(checkpoints).values())
    if limit == 0 or not found:
        return
    scores = {folder: json.loads((folder / CHECKPOINT_STATE).read_text())["score"] for folder in found}
    scored = [folder for folder in found if scores[folder] is not None]
    keep = set(found[-limit:]) | set(sorted(scored, key=lambda folder: scores[folder])[-1:])
    for folder in found:
        if folder not in keep:
            shutil.rmtree(folder)
