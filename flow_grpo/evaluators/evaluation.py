"""Evaluation: fixed prompts and fixed noise through the ODE sampler, once; then every evaluator on those samples.

What they found is logged as means, and kept image by image in a record (flow_grpo/runs/evaluations.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import FrozenConfigDict
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Evaluator, Measured, SampleRequest
from flow_grpo.evaluators.diversity import diversity_request, how_often
from flow_grpo.evaluators.samples import JudgeEvaluator, ModeEvaluator, RewardEvaluator, SharedFeatures
from flow_grpo.evaluators.scenes import SceneJudge, SceneModes
from flow_grpo.files import strict_json
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.paths import identity
from flow_grpo.policy import ImageModel, Policy
from flow_grpo.prompts import PromptDataset, own_negatives
from flow_grpo.randomness import evaluation_generators
from flow_grpo.rewards.building import WeightedReward, load_scorer
from flow_grpo.rewards.chosen import reward_weights, trained_models, version_of
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.registry import CLIP_SCORER, SCENE_SCORER
from flow_grpo.rewards.scenes import SceneScorer
from flow_grpo.runs.changes import with_changes
from flow_grpo.runs.evaluations import read_record, record_path, write_record
from flow_grpo.runs.progress import Counters
from flow_grpo.runs.record import NONE_OF_THEM, Record
from flow_grpo.runs.run import Run
from flow_grpo.scenes.files import is_detector
from flow_grpo.settings import Settings
from flow_grpo.types import Samples

EXTRA = ("entropy/", "ode_log_prob/", "diversity/", "modes/", "forward_kl/")  # metrics that a record keeps besides


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation gave, on the main process; nothing on the others."""

    metrics: Mapping[str, float] = field(default_factory=dict)  # <label>/<metric> of every evaluator
    record: Record | None = None


def evaluate(
    policy: Policy, prompts: PromptDataset, evaluators: Sequence[Evaluator], settings: Settings, run: Run, prefix: str
) -> Evaluation:
    """Sample with the policy's current weights, measure, and write the image grid and the record."""
    tested = test_request(prompts, settings)
    requests = [tested, *(evaluator.request for evaluator in evaluators if evaluator.request)]
    samples = draw_samples(policy, prompts, settings, run, requests, prefix)
    views = {request: view(samples, request) for request in requests}  # who asks for the same sees the same
    found: list[tuple[Samples, Measured]] = []
    for evaluator in run.progress(evaluators, "evaluating"):
        run.check_stop()
        if run.is_main or evaluator.collective:
            seen = views[evaluator.request or tested]
            with run.failing_together(), run.writing(f"what {evaluator.name} keeps of an evaluation"):
                found.append((seen, evaluator.evaluate(seen)))
    run.check_stop(ended=True)
    if not run.is_main:
        return Evaluation()
    run.log_image(prefix, image_grid(views[tested], settings.config), run.counters.epoch)
    record = _against_base(record_of(samples, found, run.counters, setting_of(settings.config, prompts.prompts)), run)
    if run.holds_folder():  # else `log` tells
        with run.writing(str(record_path(run.folder, record.label, record.epoch))):
            run.log_record(write_record(run.folder, record, samples.images))
    return Evaluation({f"{prefix}/{k}": value for _, part in found for k, value in part.metrics.items()}, record)


def test_request(prompts: PromptDataset, settings: Settings) -> SampleRequest:
    """`num_image_per_prompt` images of each of the first `num_prompts` test prompts."""
    config = settings.config.eval
    return SampleRequest(tuple(prompts.prompts[: config.num_prompts or None]), config.num_image_per_prompt)


def draw_samples(
    policy: ImageModel,
    prompts: PromptDataset,
    settings: Settings,
    run: Run,
    requests: Sequence[SampleRequest] = (),  # none: that of the test prompts
    label: str = "eval",
    first: int = 0,
) -> Samples:
    """The images of the requests: each image once, no more and no fewer; of each prompt those from number `first` on.

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
    ids = [(p, s) for p, text in enumerate(chosen) for s in range(first, first + counts.get(text, 0))]
    share = list(range(len(ids)))[policy.accelerator.process_index :: settings.num_processes]
    policy.encode_ahead([chosen[ids[i][0]] for i in share])
    images, latents = [], []
    batches = -(-len(ids) // (settings.num_processes * config.batch_size))  # of the process that has most
    for number in run.progress(range(batches), "evaluation samples"):
        run.check_stop()
        batch = share[number * config.batch_size :][: config.batch_size]
        policy.encode_ahead([chosen[ids[i][0]] for i in batch])  # again, where there are more than are kept
        drawn = batch or policy.stand_in(range(len(ids)))
        if not drawn:
            continue
        generators = evaluation_generators(config.seed, [ids[i] for i in drawn])
        with torch.no_grad():
            x_0 = policy.sample_ode([chosen[ids[i][0]] for i in drawn], generators).final_latents
            if batch:
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


# --- the record -----------------------------------------------------------------------------------------


def record_of(
    samples: Samples, found: Sequence[tuple[Samples, Measured]], counters: Counters, setting: str = ""
) -> Record:
    """What the evaluators found of each image of their samples, joined over all that were drawn.

    Args:
        counters: what training had spent on the model.
        setting: `setting_of` what was drawn; records of different ones are not compared.
    """
    prompts = {text: number for number, text in enumerate(dict.fromkeys(samples.prompts))}
    places = {key: i for i, key in enumerate(_keys(samples))}
    record = Record(
        label=samples.label,
        epoch=counters.epoch,
        prompts=list(prompts),
        prompt=[prompts[text] for text in samples.prompts],
        noise=samples.sample_ids.tolist(),
        seconds=counters.seconds,
        network_evaluations=counters.network_evaluations,
        setting=setting,
        extra={k: v for _, part in found for k, v in part.metrics.items() if k.startswith(EXTRA)},
    )
    for seen, part in found:
        record = _joined(record, part, [places[key] for key in _keys(seen)], list(dict.fromkeys(seen.prompts)))
    return record


def _joined(record: Record, part: Measured, where: Sequence[int], prompts: Sequence[str]) -> Record:
    """A record with what one evaluator found of the images at these places, its prompts by their own numbers."""
    places, total = {text: number for number, text in enumerate(record.prompts)}, len(record.prompt)
    numbers = [places[text] for text in prompts]
    rewards = {name: _spread(values, where, total) for name, values in part.rewards.items()}
    judge, diversity = part.judge or record.judge, part.diversity or record.diversity
    if part.judge is not None and judge is not None:
        guess = [number if number in (None, NONE_OF_THEM) else numbers[number] for number in part.judge.guess]
        probability = _spread(part.judge.probability, where, total)
        judge = replace(judge, guess=_spread(guess, where, total), probability=probability)
    if part.diversity is not None and diversity is not None:
        diversity = replace(diversity, prompts=[numbers[number] for number in part.diversity.prompts])
    return replace(record, rewards={**record.rewards, **rewards}, judge=judge, diversity=diversity)


def _keys(samples: Samples) -> list[tuple[int, int]]:
    return list(zip(samples.prompt_ids.tolist(), samples.sample_ids.tolist(), strict=True))


def _spread(values: Sequence[Any], where: Sequence[int], total: int) -> list[Any]:
    """A list of `total` with the finite values at these places, and None elsewhere."""
    spread = [None] * total
    for place, value in zip(where, values, strict=True):
        spread[place] = value if value is not None and math.isfinite(value) else None
    return spread


def _against_base(record: Record, run: Run) -> Record:
    """With its changes against the base model's record of the same run, if there is one and it was drawn alike."""
    path = record_path(run.folder, record.label, 0)
    if record.epoch == 0:
        return record
    if not path.exists():
        run.tell(f"{path} is missing: nothing is compared with the base model.")
        return record
    try:
        base = read_record(path)
    except ConfigError as error:
        run.tell(f"{str(error).rstrip('.')}: nothing is compared with the base model.", key=str(path))
        return record
    if base.setting != record.setting:
        run.tell("the base model was drawn or rewarded otherwise: nothing is compared with it.")
    return with_changes(record, base)


USUAL = {"distilled_guidance": 3.5, "vae_dtype": "fp32", "text_dtype": ""}  # of config.pretrained: not in the digest


def setting_of(config: FrozenConfigDict, tested: Sequence[str]) -> str:
    """A digest of what decides an image, given its prompt and the number of its noise, and what it is rewarded for.

    `tested`: the different prompts of the test file, in its order.
    """
    rewards = {name: (weight, version_of(config, name)) for name, weight in reward_weights(config).items()}
    return _digest([*_drawing(config, tested), rewards])


def drawing_of(config: FrozenConfigDict, tested: Sequence[str]) -> str:
    """The same, whatever it is rewarded for."""
    return _digest(_drawing(config, tested))


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(strict_json(list(values)).encode()).hexdigest()[:16]


def _drawing(config: FrozenConfigDict, tested: Sequence[str]) -> list[Any]:
    evaluation, (height, width) = config.eval, image_size(config)
    values: list[Any] = [
        config.pretrained.revision,
        height if height == width else [height, width],
        config.max_sequence_length,
        evaluation.seed,
        evaluation.num_steps,
        evaluation.guidance_scale,
    ]
    values += [[name, config.pretrained[name]] for name, usual in USUAL.items() if config.pretrained[name] != usual]
    values.append(Path(config.pretrained.model).name)  # the folder may have moved
    values.append(list(tested))  # their places key the noise
    if config.pretrained.lora or config.pretrained.skip:  # else as in runs of before
        values.append([Path(config.pretrained.lora).name, list(config.pretrained.skip)])
    negatives = {"": config.negative_prompt, **own_negatives(config)}
    if config.eval.guidance_scale != 1 and any(negatives.values()):  # else as in runs of before
        values.append(sorted(negatives.items()))
    return values


# --- pictures and evaluators ----------------------------------------------------------------------------


def image_grid(samples: Samples, config: FrozenConfigDict) -> Image.Image:
    """The first images of the first prompts: a row for each prompt; black where an image is not finite."""
    rows = [
        samples.images[samples.prompt_ids == prompt][: config.eval.num_grid_images]
        for prompt in range(min(config.eval.num_grid_prompts, int(samples.prompt_ids.max()) + 1))
    ]
    grid = make_grid(torch.cat(rows), nrow=len(rows[0]), padding=1, pad_value=1.0)
    return Image.fromarray((grid.nan_to_num().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def sample_evaluators(reward: WeightedReward, settings: Settings, device: torch.device) -> list[Evaluator]:
    """Those that look at the samples alone: rewards, and judge and modes, of a CLIP or of a detector of scenes."""
    config, freq = settings.config.eval, settings.config.eval_freq
    evaluators: list[Evaluator] = [RewardEvaluator(reward, config.batch_size, device, freq)]
    independent = bool(config.judge) and identity(config.judge) not in trained_models(settings.config)
    if config.judge and is_detector(config.judge):
        detector: SceneScorer = load_scorer("config.eval.judge", SCENE_SCORER, config.judge, device)
        evaluators.append(SceneJudge(detector, freq, config.judge, independent))
        if settings.config.eval_diversity:  # the images whose diversity is measured are more of one prompt
            evaluators.append(SceneModes(detector, diversity_request(settings.config), how_often(settings.config)))
        else:
            evaluators.append(SceneModes(detector, None, freq))
    elif config.judge:
        scorer: ClipScorer = load_scorer("config.eval.judge", CLIP_SCORER, config.judge, device)
        features = SharedFeatures(scorer, config.batch_size)
        evaluators.append(JudgeEvaluator(features, freq, config.judge, independent))
        if config.modes:
            evaluators.append(ModeEvaluator.load(features, config.modes, freq))
    return evaluators


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """Those of the samples alone, of a training."""
    return sample_evaluators(reward, settings, policy.device)
