"""What scripts/bench/entropy.py compares: the methods, the approach that is replaced, model and data, the reference."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flow_grpo.diffusers_patch.velocity import VelocityFn, guided_velocity
from flow_grpo.entropy import LOG_2PI, DivergenceEstimator, ProbeGenerators, divergence, draw_probes
from flow_grpo.errors import ConfigError
from flow_grpo.models.sd3 import SD3
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import PromptEmbeds
from scripts.tiny.measure import load_pipeline

DIFFERENCE_STEP = 1e-3


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    solver: str  # "replaced", or a solver of flow_grpo.entropy
    probes: int
    steps: int
    second_order: bool = False
    dtype: str = "fp32"

    @property
    def evaluations(self) -> int:
        """Of the velocity and its divergence."""
        return self.steps * {"replaced": 1, "euler": 1, "heun": 2, "rk4": 4}[self.solver]

    @property
    def name(self) -> str:
        """As the table has it."""
        solver = "forward difference, Gaussian, Euler" if self.solver == "replaced" else self.solver
        return f"{solver}{' + second order' if self.second_order else ''}, {self.steps} steps"


def methods(steps: int) -> list[Method]:
    """The rows: what is replaced, ours, ours at `steps` evaluations, ours in bfloat16."""
    rows = [Method("replaced", n, steps, dtype=dtype) for dtype in ("fp32", "bf16") for n in (1, 4, 16)]
    rows += [Method(solver, n, steps) for solver in ("euler", "heun", "rk4") for n in (1, 4, 16)]
    rows += [Method("heun", 1, max(steps // 2, 1)), Method("rk4", 1, max(steps // 4, 1))]
    rows += [Method("euler", 1, steps, second_order=True)]
    return rows + [Method("euler", n, steps, dtype="bf16") for n in (1, 4)] + [Method("heun", 1, steps, dtype="bf16")]


# --- the approach that is replaced ------------------------------------------------------------------------


def forward_difference(velocity: VelocityFn, x: Tensor, sigma: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """v and the mean over probes of z . (v(x + h z) - v(x)) / h: (B, ...), (B,)."""
    v = velocity(x, sigma)
    traces = [(z * (velocity(x + DIFFERENCE_STEP * z, sigma) - v)).flatten(1).sum(1) / DIFFERENCE_STEP for z in probes]
    return v, torch.stack(traces).mean(0)


def replaced_log_density(
    velocity: VelocityFn, x_0: Tensor, sigmas: Tensor, generators: ProbeGenerators, num_probes: int = 1
) -> Tensor:
    """log p_0(x_0) by Euler and one-sided differences along rising sigmas: (B,) float64."""
    x, integral = x_0, torch.zeros(len(x_0), dtype=torch.float64)
    gaussian = DivergenceEstimator(num_probes=num_probes, distribution="gaussian")
    levels = sigmas.tolist()
    with torch.no_grad():
        for i, (sigma, after) in enumerate(pairwise(levels)):
            v, trace = forward_difference(velocity, x, sigma, draw_probes(x, gaussian, generators(i)))
            integral += (after - sigma) * trace.double()
            x = x + (after - sigma) * v
    return integral - 0.5 * (x.double().square().flatten(1).sum(1) + x[0].numel() * LOG_2PI)


# --- model, data and reference ----------------------------------------------------------------------------


class Bench:
    """The model in both precisions, the embedded prompts, and the data."""

    def __init__(self, model: Path, prompts: Path, args: argparse.Namespace) -> None:
        if not (model / "model_index.json").is_file():
            raise ConfigError(f"--model: {model} holds no pipeline")
        pipeline = load_pipeline(model)
        texts = list(PromptDataset.load(str(prompts)).prompts)
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                [*texts, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=8
            )
        self.args, self.embeds, self.count = args, PromptEmbeds(embeds, pooled), len(texts)
        transformer = pipeline.transformer.requires_grad_(False).eval()
        self.transformers = {"fp32": transformer, "bf16": copy.deepcopy(transformer).bfloat16()}
        self.shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)

    def velocity(self, ids: Sequence[int], dtype: str = "fp32") -> VelocityFn:
        """The guided velocity of the prompts of these samples, in turn."""
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        pooled = self.embeds.pooled_prompt_embeds
        assert pooled is not None
        typed = PromptEmbeds(self.embeds.prompt_embeds.to(kind), pooled.to(kind))
        embeds: PromptEmbeds = typed[[i % self.count for i in ids]]
        negative = typed[[self.count] * len(ids)]
        network = partial(SD3.velocity, self.transformers[dtype])
        return lambda x, sigma: guided_velocity(network, x, sigma, embeds, negative, self.args.guidance)

    def data(self, count: int) -> Tensor:
        """x_0 of keyed noise, by RK4: (count, C, h, w)."""
        noise = [torch.randn(self.shape, generator=keyed_generator(self.args.seed, "x_1", i)) for i in range(count)]
        return follow(self.velocity(range(count)), torch.stack(noise), 1.0, 0.0, 1 / self.args.steps)

    def probe_generators(self, ids: Sequence[int]) -> ProbeGenerators:
        """Keyed by (seed, evaluation, row, sample): rows that repeat a sample have their own probes."""
        seed = self.args.seed
        return lambda evaluation: [keyed_generator(seed, "probe", evaluation, row, i) for row, i in enumerate(ids)]


def follow(velocity: VelocityFn, x: Tensor, start: float, end: float, step: float) -> Tensor:
    """x at `end`, by RK4 in steps no longer than `step`."""
    count = max(1, math.ceil(abs(end - start) / step - 1e-9))
    h = (end - start) / count
    with torch.no_grad():
        for i in range(count):
            sigma = start + i * h
            a = velocity(x, sigma)
            b = velocity(x + h / 2 * a, sigma + h / 2)
            c = velocity(x + h / 2 * b, sigma + h / 2)
            d = velocity(x + h * c, max(sigma + h, 0.0))
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def reference(velocity: VelocityFn, x_0: Tensor, nodes: int, refinement: int, probes: Tensor) -> tuple[Tensor, float]:
    """log p_0(x_0) and the root-mean-square error of it that the probes leave, in nats.

    RK4 follows the path, a step for each of `nodes * refinement` equal intervals. The trapezoid rule takes exact traces
    at every `refinement`-th level; the probes, held along the path, say what all the levels change.

    Args:
        probes: (n >= 2, B, ...).
    """
    levels, x, exact, held = np.linspace(0, 1, nodes * refinement + 1), x_0, [], []
    held_estimator, exact_estimator = DivergenceEstimator(num_probes=len(probes)), DivergenceEstimator(exact=True)
    for i, level in enumerate(tqdm(levels, desc="reference", leave=False)):
        if i:
            x = follow(velocity, x, levels[i - 1], level, 1.0)
        held.append(divergence(velocity, x, float(level), held_estimator, probes).per_probe.numpy())
        if i % refinement == 0:
            exact.append(divergence(velocity, x, float(level), exact_estimator).mean.numpy())
    coarse = np.trapezoid(exact, levels[::refinement], axis=0)  # (B,)
    change = np.trapezoid(held, levels, axis=0) - np.trapezoid(
        held[::refinement], levels[::refinement], axis=0
    )  # (n, B)
    error = math.sqrt(change.var(0, ddof=1).mean() / len(probes))
    log_prior = -0.5 * (x.double().square().flatten(1).sum(1) + x[0].numel() * LOG_2PI)
    return log_prior + torch.from_numpy(coarse + change.mean(0)), error
