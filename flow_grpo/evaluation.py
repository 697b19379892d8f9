"""Evaluation: fixed prompts and fixed noise through the ODE sampler, once; then every evaluator on those samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import FrozenConfigDict
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from flow_grpo.evaluators.base import Evaluator, SampleRequest
from flow_grpo.evaluators.samples import JudgeEvaluator, ModeEvaluator, RewardEvaluator
from flow_grpo.ode_log_prob import OdeLogProbEvaluator
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import evaluation_generators
from flow_grpo.rewards import WeightedReward
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.registry import CLIP_SCORER, load_scorer
from flow_grpo.settings import Settings
from flow_grpo.step_visualizer import StepVisualizer
from flow_grpo.tracking import Run
from flow_grpo.types import Samples


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
