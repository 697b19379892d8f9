"""What an epoch of SD3.5-medium costs on one GPU: images a second, peak memory, share of the GPU's peak FLOPs.

Random weights of the published sizes, bf16, LoRA, 512 x 512 pixels, guidance and steps of the recipe, PickScore: what
is computed does not depend on the weights' values. Prompts are embedded beforehand, so no text encoder is on the GPU.
The parts of an epoch are the package's own, put together here as its loops do, without their folders and records.

Wall-clock seconds, the GPU waited for at both ends; the first epoch is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.likelihood_ratio import RatioKeys, likelihood_of
from flow_grpo.loops.drtune import chain_gradient, equally_spaced, executed_steps
from flow_grpo.loops.policy_gradient import Minibatch, step_loss
from flow_grpo.loops.reward_gradient import Objective
from flow_grpo.policy import Policy
from flow_grpo.training.performance import flops_per_evaluation, peak_flops
from flow_grpo.types import Trajectory
from scripts.bench import memory_models, memory_phases

PIXELS, IMAGES, BATCH, ROUNDS = 512, 16, 4, 3
WINDOW = 4  # of GRPO's stochastic steps
Reward = Callable[[torch.Tensor, Sequence[str], Sequence[Mapping[str, Any]]], torch.Tensor]


@dataclass(frozen=True)
class Epoch:
    """One update, of so many images in batches."""

    policy: Policy
    reward: Reward
    images: int
    batch: int

    def grpo(self, window: int) -> None:
        """A rollout with so many stochastic steps, its rewards, and a training of each of those steps."""
        for start in range(0, self.images, self.batch):
            trajectory = self._rollout(start, window)
            with torch.no_grad():
                rewards = self._score(trajectory.final_latents)
            self._train(trajectory, rewards - rewards.mean())
        self._update()

    def drtune(self) -> None:
        """The gradient of the reward through some steps, one at a time."""
        policy, config = self.policy, self.policy.settings.config
        sample, draw = config.sample, torch.Generator().manual_seed(0)
        levels = policy.sigmas(sample.num_steps).tolist()
        chain = executed_steps(levels, sde_type="ode", noise_level=0.0, generator=draw)
        chain = equally_spaced(chain, config.drtune.num_train_steps, draw)
        for start in range(0, self.images, self.batch):
            objective = Objective(
                velocity=policy.velocity(policy.encode([""] * self.batch), sample.guidance_scale),
                losses=lambda x: -self._score(x),
                backward=lambda loss: policy.accelerator.backward(self.batch / self.images * loss),
            )
            generators = self._generators(start)
            chain_gradient(objective, policy.noise(generators), generators, chain=chain, two_pass=True)
        self._update()

    def _generators(self, start: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(start + i) for i in range(self.batch)]

    def _score(self, latents: torch.Tensor) -> torch.Tensor:
        return self.reward(self.policy.decode(latents), [""] * len(latents), [{} for _ in latents])

    def _rollout(self, start: int, window: int) -> Trajectory:
        policy, sample, generators = self.policy, self.policy.settings.config.sample, self._generators(start)
        velocity = policy.velocity(policy.encode([""] * self.batch), sample.guidance_scale)
        with torch.no_grad():
            return pipeline_with_logprob(
                velocity, policy.noise(generators), policy.sigmas(sample.num_steps), sde_type="sde",
                noise_level=sample.noise_level, window=range(window), generators=generators,
            )  # fmt: skip

    def _train(self, trajectory: Trajectory, advantages: torch.Tensor) -> None:
        policy, config = self.policy, self.policy.settings.config
        velocity = policy.velocity(policy.encode([""] * self.batch), config.sample.guidance_scale)
        minibatch = Minibatch(
            velocity, None, likelihood_of(config), RatioKeys(0, 0, 0, tuple(range(self.batch))), trajectory,
            advantages=advantages, old_log_probs=trajectory.log_probs,
        )  # fmt: skip
        slots = len(trajectory.stochastic_steps)
        for slot in range(slots):
            loss = step_loss(minibatch, slot, config)["loss"]
            policy.accelerator.backward(self.batch / self.images / slots * loss)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.trainable, self.policy.settings.config.train.max_grad_norm)
        self.policy.optimizer.step()
        self.policy.optimizer.zero_grad()
        if self.policy.ema is not None:
            self.policy.ema.step(self.policy.trainable)


def epochs(epoch: Epoch) -> Mapping[str, Callable[[], None]]:
    """What is timed, by name."""
    steps = epoch.policy.settings.config.sample.num_steps
    return {
        f"GRPO, {WINDOW} of {steps} steps": lambda: epoch.grpo(WINDOW),
        f"GRPO, all {steps} steps": lambda: epoch.grpo(steps),
        "DRTune, two passes": epoch.drtune,
    }


def timed(name: str, work: Callable[[], None], epoch: Epoch, rounds: int) -> dict[str, Any]:
    """One row. `peak_gib` and `mfu` are None off the GPU, or where the GPU's peak is not known."""
    policy, cuda = epoch.policy, epoch.policy.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    work()
    policy.network_evaluations = policy.trained_evaluations = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - begin)
    evaluations = (policy.network_evaluations + policy.trained_evaluations) / rounds  # LoRA: backward as forward
    peak = peak_flops(policy.device, "bf16")
    median = statistics.median(seconds)
    return {
        "case": name,
        "images": epoch.images,
        "seconds": median,
        "images_per_second": epoch.images / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "mfu": evaluations * flops_per_evaluation(policy) / median / peak if peak else None,
    }


def sd35_medium(model: memory_models.Model, device: torch.device, pixels: int) -> Policy:
    """A policy of random weights, with the scheduler of SD3.5."""
    family = memory_models.build_family(model, device, torch.bfloat16)
    family.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return memory_phases.policy_of(family, memory_models.settings(model, pixels, "lora"), device)


def write(folder: Path) -> None:
    """Time SD3.5-medium on this GPU, into gpu.json; ConfigError where there is none."""
    if not torch.cuda.is_available():
        raise ConfigError("--gpu needs a GPU, and torch finds none.")
    device = torch.device("cuda")
    model = next(model for model in memory_models.MODELS if model.name == "SD3.5-medium")
    policy = sd35_medium(model, device, PIXELS)
    epoch = Epoch(policy, memory_models.build_reward(device), IMAGES, BATCH)
    rows = [timed(name, work, epoch, ROUNDS) for name, work in epochs(epoch).items()]
    config = policy.settings.config
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "pixels": PIXELS,
        "batch": BATCH,
        "guidance": config.sample.guidance_scale,
        "gradient_checkpointing": bool(config.gradient_checkpointing),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "gpu.json", strict_json(found, indent=1) + "\n")
    for row in rows:
        print(strict_json(row))
