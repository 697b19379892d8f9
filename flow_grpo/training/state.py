"""All that training changes, in memory and in a checkpoint: weights, averages, the optimizer's moments, counters.

Tensors have the names of the model's weights: "weights.NAME", "average.NAME", "optimizer.exp_avg.NAME", ...; "old.NAME"
are the old weights of methods that keep some from epoch to epoch.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.methods.forward_process import keeps_old
from flow_grpo.models.files import first_line
from flow_grpo.optimizers import moment_shape, moments_of, set_moments
from flow_grpo.policy import Policy
from flow_grpo.runs.run import Run
from flow_grpo.runs.saved import CHECKPOINT_STATE, OLD_TENSORS, TENSORS, checkpoint_state

WEIGHTS, AVERAGE, OLD, MOMENTS = "weights", "average", "old", "optimizer"


@dataclass(frozen=True)
class TrainingState:
    """All that training changes: of whole tensors, as on disk, or of a process's parts of them."""

    tensors: Mapping[str, Tensor]  # by the names above
    plain: Mapping[str, Any]  # numbers of the average, the loss scaler, the policy and the rewards
    counters: Mapping[str, int | float]
    evaluated: bool  # whether the evaluation that is due at this epoch has been made

    def of(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind, by the names of the weights."""
        return {k.removeprefix(f"{kind}."): v for k, v in self.tensors.items() if k.startswith(f"{kind}.")}

    def to_cpu(self) -> TrainingState:
        """A copy in main memory that training does not change."""
        copies = {name: value.detach().to("cpu", copy=True) for name, value in self.tensors.items()}
        return TrainingState(copies, self.plain, self.counters, self.evaluated)


# --- in memory ------------------------------------------------------------------------------------------


def collect(policy: Policy, run: Run, evaluated: bool) -> TrainingState:
    """This process's part of the state as it is now; its tensors are those that training goes on to change."""
    tensors = trained_tensors(policy)
    if policy.old is not None:
        tensors |= {f"{OLD}.{name}": value for name, value in zip(policy.named_trainable, policy.old, strict=True)}
    names = list(policy.named_trainable)
    for number, moments in moments_of(policy.optimizer).items():
        tensors |= {f"{MOMENTS}.{moment}.{names[number]}": value for moment, value in moments.items()}
    plain: dict[str, Any] = {"skipped_in_a_row": policy.skipped_in_a_row}
    if run.composition.is_scaled:
        plain["rewards"] = run.composition.state_dict()
    if policy.ema is not None:
        plain["average"] = {k: v for k, v in policy.ema.state_dict().items() if k != "shadow_params"}
    if policy.accelerator.scaler is not None:
        plain["scaler"] = policy.accelerator.scaler.state_dict()
    return TrainingState(tensors, plain, run.counters.state_dict(), evaluated)


def gathered(policy: Policy, state: TrainingState) -> TrainingState | None:
    """Collective: the state whose parts the processes hold, in main memory of the main process; None on the others."""
    tensors = {}
    for key, part in state.tensors.items():
        kind, _, name = key.partition(".")
        if part.dim() == 0:  # a count of steps
            tensors[key] = part.cpu()
            continue
        whole = policy.weights.whole(name.partition(".")[2] if kind == MOMENTS else name, part)
        if whole is not None:
            tensors[key] = whole.contiguous()
    return replace(state, tensors=tensors) if policy.accelerator.is_main_process else None


def restore(policy: Policy, run: Run, state: TrainingState, source: str) -> None:
    """Set the policy and the run's counters to a state of whole tensors.

    Learning rate and the like, and the decay of the average, stay those of the present configuration.

    Raises:
        ConfigError: naming `source`, if its tensors are not those of this policy, or not finite; nothing is set then.
    """
    if broken := not_finite({k: v for k, v in state.tensors.items() if not k.startswith(MOMENTS)}):
        raise ConfigError(f"{source}: {broken} holds values that are not finite numbers.")
    weights = matching_weights(policy, state.tensors, WEIGHTS, source)
    average = None if policy.ema is None else matching_weights(policy, state.tensors, AVERAGE, source)
    old = keeps_old(policy.settings.config) and any(name.startswith(f"{OLD}.") for name in state.tensors)
    old_weights = matching_weights(policy, state.tensors, OLD, source) if old else None
    moments = _moments(policy, state.tensors, source)
    with torch.no_grad():
        for parameter, value in zip(policy.trainable, weights, strict=True):
            parameter.copy_(value)
    policy.old = None if old_weights is None else [value.to(policy.device, copy=True) for value in old_weights]
    set_moments(policy.optimizer, moments)
    if policy.ema is not None and average is not None:
        kept = {"decay": policy.ema.decay, "shadow_params": [value.clone() for value in average]}
        policy.ema.load_state_dict({**state.plain["average"], **kept})
        policy.ema.to(policy.device)
    if policy.accelerator.scaler is not None:
        policy.accelerator.scaler.load_state_dict(state.plain["scaler"])
    policy.skipped_in_a_row = state.plain.get("skipped_in_a_row", 0)
    run.composition.load_state_dict(state.plain.get("rewards", {}))
    run.counters.load_state_dict(state.counters)


def matching_weights(policy: Policy, tensors: Mapping[str, Tensor], kind: str, source: str) -> list[Tensor]:
    """This process's parts of the whole tensors of one kind, in the order of `policy.trainable`.

    Raises:
        ConfigError: naming `source`, unless each fits.
    """
    return [
        policy.weights.part(name, _matching(tensors, f"{kind}.{name}", policy.weights.shape(name), source))
        for name in policy.named_trainable
    ]


def _matching(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, source: str) -> Tensor:
    value = tensors.get(name)
    if value is None:
        raise ConfigError(f"{source} has no {name}: it is of another model, or has no such weights.")
    if value.shape != shape:
        raise ConfigError(f"{source}: {name} has the shape {tuple(value.shape)}, where the model has {tuple(shape)}.")
    if not value.is_floating_point():
        raise ConfigError(f"{source}: {name} holds {value.dtype} instead of floating-point numbers.")
    return value


def _moments(policy: Policy, tensors: Mapping[str, Tensor], source: str) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state as torch numbers it; empty before the first update."""
    names = {name: number for number, name in enumerate(policy.named_trainable)}
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind != MOMENTS:
            continue
        moment, _, name = rest.partition(".")
        if name not in names or (value.dim() and value.shape != moment_shape(moment, policy.weights.shape(name))):
            raise ConfigError(f"{source}: {key} does not fit the model.")
        found.setdefault(names[name], {})[moment] = policy.weights.part(name, value) if value.dim() else value
    return found


def trained_tensors(policy: Policy) -> dict[str, Tensor]:
    """What this process holds of the trained weights and their average, by their names in a checkpoint."""
    tensors = {f"{WEIGHTS}.{name}": value.detach() for name, value in policy.named_trainable.items()}
    if policy.ema is not None:
        pairs = zip(policy.named_trainable, policy.ema.shadow_params, strict=True)
        tensors |= {f"{AVERAGE}.{name}": value for name, value in pairs}
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that holds a value which is not finite."""
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    return next((name for name, fine in zip(tensors, finite, strict=True) if not fine), None)


# --- reading --------------------------------------------------------------------------------------------


def read(folder: Path) -> TrainingState:
    """The state in a checkpoint that was found whole.

    Raises:
        ConfigError: it cannot be read after all.
    """
    state = checkpoint_state(folder)
    if "format" not in state:
        return _read_old(folder, state)
    tensors = read_tensors(folder)
    plain, evaluated = state.get("plain"), state.get("evaluated", True)
    if not isinstance(plain, dict):
        raise ConfigError(f"{folder / CHECKPOINT_STATE} is damaged: it has no plain numbers.")
    return TrainingState(tensors, plain, state["counters"], bool(evaluated))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU; ConfigError if the file is damaged."""
    if (folder / OLD_TENSORS).is_file():
        return _old_tensors(_read_pickle(folder / OLD_TENSORS))
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / TENSORS} is damaged: {first_line(error)}.") from None


def _read_old(folder: Path, state: Mapping[str, Any]) -> TrainingState:
    """Of a checkpoint of before the manifest, whose tensors have numbers instead of names."""
    saved = _read_pickle(folder / OLD_TENSORS)
    plain: dict[str, Any] = {}
    if saved.get("ema") is not None:
        plain["average"] = {name: value for name, value in saved["ema"].items() if name != "shadow_params"}
    if saved.get("scaler") is not None:
        plain["scaler"] = saved["scaler"]
    return TrainingState(_old_tensors(saved), plain, state["counters"], evaluated=True)


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} is damaged: {first_line(error)}.") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("trainable"), list):
        raise ConfigError(f"{path} is damaged: it holds no trained weights.")
    return saved


def _old_tensors(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """By kind and number; `_named` gives them the names of a policy's weights."""
    tensors = {f"{WEIGHTS}.{number}": value for number, value in enumerate(saved["trainable"])}
    if saved.get("ema") is not None:
        tensors |= {f"{AVERAGE}.{number}": value for number, value in enumerate(saved["ema"]["shadow_params"])}
    for number, moments in saved.get("optimizer", {}).get("state", {}).items():
        tensors |= {f"{MOMENTS}.{moment}.{number}": torch.as_tensor(value) for moment, value in moments.items()}
    return tensors


def named_as(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an old checkpoint under the names of this policy's weights; those of a new one as they are."""
    names = list(policy.named_trainable)

    def named(key: str) -> str:
        front, _, last = key.rpartition(".")
        return f"{front}.{names[int(last)]}" if last.isdecimal() and int(last) < len(names) else key

    return {named(key): value for key, value in tensors.items()}
