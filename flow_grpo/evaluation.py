"""Evaluation: fixed prompts and fixed noise through the ODE sampler, once; then every evaluator on those samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import FrozenConfigDict
from PIL import Image
from scipy.stats import entropy
from torch import Tensor
from torchvision.utils import make_grid

from flow_grpo.ode_log_prob import OdeLogProbEvaluator
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import evaluation_generators
from flow_grpo.rewards import WeightedReward
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.registry import CLIP_SCORER, load_scorer
from flow_grpo.settings import Settings, read_modes
from flow_grpo.step_visualizer import StepVisualizer
from flow_grpo.tracking import Run
from flow_grpo.types import Samples


@dataclass(frozen=True)
class SampleRequest:
    """Images that an evaluator needs: those of its prompts that are also evaluated otherwise are shared."""

    prompts: tuple[str, ...]
    num_image_per_prompt: int


class Evaluator(Protocol):
    """Measures the samples of one evaluation."""

    name: str
    freq: int  # epochs from one evaluation to the next; 0: never
    collective: bool  # whether `evaluate` is called on every process, or on the main one only

    @property
    def request(self) -> SampleRequest | None:
        """What it looks at; None: `eval.num_image_per_prompt` images of each test prompt."""

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Metrics, without a prefix."""


def evaluate(
    policy: Policy, prompts: PromptDataset, evaluators: Sequence[Evaluator], settings: Settings, run: Run, prefix: str
) -> dict[str, float]:
    """Sample with the policy's current weights, measure, and write the image grid.

    Returns:
        `prefix/<metric>` of every evaluator, on the main process; nothing on the others.
    """
    tested = test_request(prompts, settings)
    requests = [tested, *(evaluator.request for evaluator in evaluators if evaluator.request)]
    samples = draw_samples(policy, prompts, settings, run, requests, prefix)
    metrics: dict[str, float] = {}
    for evaluator in run.progress(evaluators, "evaluating"):
        run.check_stop()
        if run.is_main or evaluator.collective:
            seen = view(samples, evaluator.request or tested)
            with run.writing(f"what {evaluator.name} keeps of an evaluation"):
                metrics |= {f"{prefix}/{name}": value for name, value in evaluator.evaluate(seen).items()}
    if not run.is_main:
        return {}
    run.log_image(prefix, image_grid(view(samples, tested), settings.config), run.counters.epoch)
    return metrics


def test_request(prompts: PromptDataset, settings: Settings) -> SampleRequest:
    """`num_image_per_prompt` images of each of the first `num_prompts` test prompts."""
    config = settings.config.eval
    return SampleRequest(tuple(prompts.prompts[: config.num_prompts or None]), config.num_image_per_prompt)


def draw_samples(
    policy: Policy,
    prompts: PromptDataset,
    settings: Settings,
    run: Run,
    requests: Sequence[SampleRequest] = (),  # none: that of the test prompts
    label: str = "eval",
) -> Samples:
    """The images of the requests: each image once, no more and no fewer.

    Image s of prompt p has noise keyed by (eval.seed, p, s); p is the prompt's place among the different ones of the
    test file, prompts that it lacks come after. Processes take every n-th image; the result is complete and in order
    on every process.
    """
    config, requests = settings.config.eval, requests or [test_request(prompts, settings)]
    rows = {text: row for row, text in enumerate(prompts.prompts)}
    chosen = tuple(dict.fromkeys([*rows, *(text for request in requests for text in request.prompts)]))
    counts: dict[str, int] = {}
    for request in requests:
        for text in request.prompts:
            counts[text] = max(counts.get(text, 0), request.num_image_per_prompt)
    ids = [(p, s) for p, text in enumerate(chosen) for s in range(counts.get(text, 0))]
    share = list(range(len(ids)))[policy.accelerator.process_index :: settings.num_processes]
    images, latents = [], []
    batches = -(-len(ids) // (settings.num_processes * config.batch_size))  # of the process that has most
    for number in run.progress(range(batches), "evaluation samples"):
        run.check_stop()
        batch = share[number * config.batch_size :][: config.batch_size]
        if not batch:
            continue
        generators = evaluation_generators(config.seed, [ids[i] for i in batch])
        with torch.no_grad():
            x_0 = policy.sample_ode([chosen[ids[i][0]] for i in batch], generators).final_latents
            images.append(policy.decode(x_0).float().cpu())
            latents.append(x_0.cpu())
    return Samples(
        images=_gather_in_order(images, share),
        latents=_gather_in_order(latents, share),
        prompts=tuple(chosen[p] for p, _ in ids),
        metadata=tuple(prompts.metadata[rows[chosen[p]]] if chosen[p] in rows else {} for p, _ in ids),
        prompt_ids=torch.tensor([p for p, _ in ids]),
        sample_ids=torch.tensor([s for _, s in ids]),
        label=label,
    )


def view(samples: Samples, request: SampleRequest) -> Samples:
    """The images of one request."""
    wanted, number = set(request.prompts), samples.sample_ids.tolist()
    return samples[
        [i for i, text in enumerate(samples.prompts) if text in wanted and number[i] < request.num_image_per_prompt]
    ]


def _gather_in_order(parts: list[Tensor], positions: list[int]) -> Tensor:
    """Join the processes' batches, of any sizes, in the order of the positions: (N, ...) on every process."""
    shares = gather_object([(positions, torch.cat(parts) if parts else None)])
    found = {position: rows[k] for held, rows in shares for k, position in enumerate(held)}
    return torch.stack([found[position] for position in sorted(found)])


def image_grid(samples: Samples, config: FrozenConfigDict) -> Image.Image:
    """The first images of the first prompts: a row for each prompt; black where an image is not finite."""
    rows = [
        samples.images[samples.prompt_ids == prompt][: config.eval.num_grid_images]
        for prompt in range(min(config.eval.num_grid_prompts, int(samples.prompt_ids.max()) + 1))
    ]
    grid = make_grid(torch.cat(rows), nrow=len(rows[0]), padding=1, pad_value=1.0)
    return Image.fromarray((grid.nan_to_num().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


# --- evaluators ----------------------------------------------------------------------------------------


class RewardEvaluator:
    """`reward/total`, the weighted sum that is trained on, and `reward/<name>` of every reward in use."""

    name, collective, request = "reward", False, None

    def __init__(self, reward: WeightedReward, batch_size: int, device: torch.device, freq: int = 1) -> None:
        self.reward, self.batch_size, self.device, self.freq = reward, batch_size, device, freq

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Means over the samples."""
        sums: dict[str, float] = {}
        for part in _slices(len(samples.prompts), self.batch_size):
            images = samples.images[part].to(self.device)
            scores = self.reward.evaluate(images, samples.prompts[part], samples.metadata[part])
            for name, value in {"total": scores.total, **scores.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum().item()
        return {f"reward/{name}": value / len(samples.prompts) for name, value in sums.items()}


class JudgeEvaluator:
    """How well a CLIP that is not the reward recognises each image's prompt among the evaluated ones.

    `judge/accuracy`: share of images whose best-matching prompt is their own. `judge/similarity`: mean cosine with it.
    Both are nan if an image is not finite.
    """

    name, collective, request = "judge", False, None

    def __init__(self, scorer: ClipScorer, batch_size: int, freq: int = 1) -> None:
        self.scorer, self.batch_size, self.freq = scorer, batch_size, freq

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Over all samples."""
        candidates = tuple(dict.fromkeys(samples.prompts))
        similarity = similarities(self.scorer, samples.images, candidates, self.batch_size)  # (N, candidates)
        own = torch.tensor([candidates.index(prompt) for prompt in samples.prompts])
        known = bool(similarity.isfinite().all())
        return {
            "judge/accuracy": (similarity.argmax(1) == own).double().mean().item() if known else math.nan,
            "judge/similarity": similarity.gather(1, own[:, None]).double().mean().item(),
        }


class ModeEvaluator:
    """Counts the known modes of each prompt, e.g. the colours of "a sneaker", as the judge sees them.

    `modes/<mode>`: share of the images. `modes/entropy`: of these shares, in nats; log of the number of modes at most.
    All are nan if an image is not finite.
    """

    name, collective, request = "modes", False, None

    def __init__(
        self, scorer: ClipScorer, modes: Mapping[str, Mapping[str, str]], batch_size: int, freq: int = 1
    ) -> None:
        """`modes`: prompt -> mode -> the caption that describes it."""
        self.scorer, self.modes, self.batch_size, self.freq = scorer, modes, batch_size, freq

    @classmethod
    def load(cls, scorer: ClipScorer, path: str, batch_size: int, freq: int = 1) -> ModeEvaluator:
        """Read the modes from a JSON file; ConfigError if it holds something else."""
        return cls(scorer, read_modes(Path(path), "config.eval.modes: "), batch_size, freq)

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Over the samples of prompts whose modes are known; nothing if there are none."""
        counts: dict[str, float] = {}
        for prompt in dict.fromkeys(samples.prompts):
            if not self.modes.get(prompt):
                continue
            images = samples.images[[i for i, other in enumerate(samples.prompts) if other == prompt]]
            names, captions = zip(*self.modes[prompt].items(), strict=True)
            found = similarities(self.scorer, images, captions, self.batch_size)
            best, unknown = found.argmax(1), 0.0 if found.isfinite().all() else math.nan
            for index, name in enumerate(names):
                counts[name] = counts.get(name, 0.0) + int((best == index).sum()) + unknown
        if not counts:
            return {}
        total = sum(counts.values())
        shares = {f"modes/{name}": count / total for name, count in counts.items()}
        return shares | {"modes/entropy": float(entropy(list(counts.values())))}


def similarities(scorer: ClipScorer, images: Tensor, texts: Sequence[str], batch_size: int) -> Tensor:
    """Cosine of every image (N, 3, H, W) with every text: (N, texts), on the CPU."""
    text_features = scorer.text_features(texts)
    parts = [scorer.image_features(images[part]) @ text_features.T for part in _slices(len(images), batch_size)]
    return torch.cat(parts).cpu()


def sample_evaluators(reward: WeightedReward, settings: Settings, device: torch.device) -> list[Evaluator]:
    """Those that look at the samples alone: rewards, and judge and modes if they are configured."""
    config, freq = settings.config.eval, settings.config.eval_freq
    evaluators: list[Evaluator] = [RewardEvaluator(reward, config.batch_size, device, freq)]
    if config.judge:
        scorer: ClipScorer = load_scorer("config.eval.judge", CLIP_SCORER, config.judge, device)
        evaluators.append(JudgeEvaluator(scorer, config.batch_size, freq))
        if config.modes:
            evaluators.append(ModeEvaluator.load(scorer, config.modes, config.batch_size, freq))
    return evaluators


def build_evaluators(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """All that the configuration asks for."""
    config, evaluators = settings.config, sample_evaluators(reward, settings, policy.device)
    if config.eval_ode_log_prob:
        evaluators.append(OdeLogProbEvaluator(policy, settings, run))
    if config.visualize_steps:
        evaluators.append(StepVisualizer(policy, settings, run))
    return evaluators


def _slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(total)."""
    return (slice(start, start + size) for start in range(0, total, size))
