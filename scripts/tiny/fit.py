"""One loop for all tiny models: its recipe, its schedule, and the state from which it continues."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from flow_grpo.errors import ConfigError
from flow_grpo.randomness import keyed_generator


@dataclass(frozen=True)
class Recipe:
    """How one model is optimised: AdamW, linear warm-up, a flat part, then half a cosine to zero."""

    steps: int
    batch: int  # images a step
    learning_rate: float  # of the flat part
    weight_decay: float = 0.01
    beta2: float = 0.99
    warmup: int = 100  # steps
    flat: float = 0.0  # fraction of the steps before the cosine begins
    ema_decay: float = 0.0  # 0: no average is kept

    def rate(self, step: int) -> float:
        """The learning rate of a step as a fraction of `learning_rate`."""
        done = max(0.0, (step / self.steps - self.flat) / (1 - self.flat))
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + cos(pi * min(1.0, done)))


class Fit:
    """One model being trained: its optimizer, schedule, average, and the file it continues from.

    `ingredients`: whatever else decides the result (plain values); a state made with others is not continued.
    """

    def __init__(
        self, name: str, modules: Sequence[nn.Module], recipe: Recipe, seed: int, work: Path, **ingredients: Any
    ) -> None:
        self.name, self.recipe, self.seed, self.ingredients, self.step = name, recipe, seed, ingredients, 0
        self.modules = torch.nn.ModuleList(modules)
        self.parameters = [parameter for parameter in self.modules.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [  # matrices decay, gains and biases do not
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, recipe.beta2),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.rate)
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.path = work / f"{name}.pt"

    def run(self, loss: Callable[[torch.Generator], Tensor], save_every: int) -> None:
        """Continue from the saved state, if any, to the recipe's last step; then load the average.

        `loss` draws its batch and its noise from the generator it is given.
        """
        self.restore()
        last = self.recipe.steps
        bar = tqdm(range(self.step, last), desc=self.name, initial=self.step, total=last, mininterval=2)
        for step in bar:
            value = loss(keyed_generator(self.seed, self.name, step))
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.step = step + 1
            if self.step % save_every == 0 or self.step == last:
                self.save()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        self.modules.eval()

    def save(self) -> None:
        """Write the state under a temporary name, then rename it: a kill leaves the old or the new file, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "key": self.key(),
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def restore(self) -> None:
        """Load the saved state if there is one; ConfigError if another recipe, seed or ingredient made it."""
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        if state["key"] != self.key():
            raise ConfigError(
                f"--work: {self.path} was made with another recipe, seed or ingredient ({state['key']}); "
                f"name another folder, remove the file, or ask for the same as before."
            )
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def key(self) -> dict[str, Any]:
        """What must be the same for a state to be continued."""
        return {"seed": self.seed, **asdict(self.recipe), **self.ingredients}


def digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of a module's weights (any dtype of numpy's)."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
