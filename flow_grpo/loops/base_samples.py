"""What a method that aims at p_base exp(lambda R) asks of the base model, measured once and kept with the run.

RUN/tilt.json has the variance of the latents of one prompt, s2 of kappa, and the strength lambda: the configured one,
or that at which the exact law, on the base model's own samples, spends the wanted KL or the wanted share of diversity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import FrozenConfigDict

from flow_grpo import frontier
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diversity.features import load_extractor
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset, own_negatives
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.rewards.chosen import version_of
from flow_grpo.rules import POSITIVE
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings

TILT_FILE = "tilt.json"
SET_SIZE, REPEATS = 16, 50  # images of a set whose diversity is measured, and sets, of each prompt
TILT = "lambda {strength:.3g}: the exact law has reward {reward:.4f} (base {base:.4f}), at {kl:.3g} nats from the base"
TILT_VENDI = "{tilt}, and {vendi:.3f} different images of {n} (base {base:.3f})"
DRAWN = "drawn"  # in the question of a tilt.json


@dataclass(frozen=True)
class Tilt:
    """What the target is."""

    strength: float  # lambda
    variance: float = math.nan  # of the latents of one prompt, mean over prompts and dimensions; nan: not asked for


@dataclass(frozen=True)
class BaseSamples:
    """N images of each of P prompts, by the base model's weights."""

    rewards: np.ndarray  # (P, N)
    variance: float  # of the latents of one prompt, mean over prompts and dimensions
    features: np.ndarray | None  # (P, N, d); None: not asked for


def tilt_of(policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run) -> Tilt:
    """The target of a run: as its folder has it, or measured now and kept there. Collective.

    Raises:
        ConfigError: the strength that was asked for is out of the base samples' reach.
    """
    config = settings.config
    if not needs_base_samples(config):
        return Tilt(config.anchored.strength, config.anchored.variance or math.nan)
    asked_for = _question(config, prompts)
    kept = run.from_main(lambda: _kept(run.folder / TILT_FILE, asked_for))
    if kept is not None and run.counters.epoch > 0:  # what an epoch that was not finished has paid is not counted
        return kept
    samples = draw_base_samples(policy, prompts, reward, settings, run)
    variance = config.anchored.variance or samples.variance
    tilt = Tilt(run.from_main(lambda: _strength(samples, config)), variance)
    if run.is_main:
        run.tell(_said(samples, tilt.strength, config))
    if run.is_main and run.holds_folder():
        with run.writing(TILT_FILE):
            answer = strict_json({"asked_for": asked_for, **asdict(tilt)}, indent=1)
            write_atomically(run.folder / TILT_FILE, answer + "\n")
    return tilt


def needs_base_samples(config: FrozenConfigDict) -> bool:
    """Whether the base model is sampled at all."""
    anchored = config.anchored
    measured = anchored.weight == "kappa" and anchored.variance == 0
    return measured or anchored.target_kl > 0 or anchored.target_diversity > 0


def _question(config: FrozenConfigDict, prompts: PromptDataset) -> dict[str, Any]:
    """What the answer depends on, as plain data."""
    anchored = dict(config.anchored.items())
    rewards = {name: value for name, value in sorted(config.reward_fn.items()) if value}
    chosen = list(prompts.prompts[: config.anchored.base_prompts])
    sampler = {"steps": config.sample.num_steps, "guidance_scale": config.sample.guidance_scale}
    models = {name: version_of(config, name) or "" for name in rewards} | {"base": config.pretrained.model}
    features = dict(config.diversity.items()) if config.anchored.target_diversity > 0 else {}
    question = {"anchored": anchored, "rewards": rewards, "seed": config.seed, "prompts": chosen, **sampler}
    if config.pretrained.lora or config.pretrained.skip:
        question |= {"lora": config.pretrained.lora, "skip": list(config.pretrained.skip)}
    negatives = {"": config.negative_prompt, **own_negatives(config)}
    if config.sample.guidance_scale != 1 and any(negatives.values()):  # else as in runs of before
        question["negatives"] = negatives
    height, width = image_size(config)
    size = height if height == width else [height, width]
    return question | {"models": models, "features": features, "resolution": size, DRAWN: _drawn(config)}


def _drawn(config: FrozenConfigDict) -> dict[str, Any]:
    """How precisely, and on what terms, the model draws."""
    names = ("revision", "distilled_guidance", "vae_dtype", "text_dtype")
    of_model = {name: config.pretrained[name] for name in names}
    return of_model | {name: config[name] for name in ("max_sequence_length", "mixed_precision")}


def _kept(path: Path, asked_for: dict[str, Any]) -> Tilt | None:
    """The answer of a file; None if there is none, or it is the answer to another question or damaged."""
    try:
        kept = read_object(path)
    except ConfigError:
        return None
    values: list[Any] = [kept.get(name) for name in ("strength", "variance")]
    question = kept.get("asked_for")
    if isinstance(question, dict) and DRAWN not in question:  # of a run of before it was noted
        question[DRAWN] = asked_for[DRAWN]
    if question != asked_for or not all(map(POSITIVE.accepts, values)):
        return None
    return Tilt(float(values[0]), float(values[1]))


def _strength(samples: BaseSamples, config: FrozenConfigDict) -> float:
    """lambda, as it is configured or as the exact law has it."""
    anchored = config.anchored
    try:
        return _strength_of_law(samples, config)
    except ConfigError as error:
        key = "target_kl" if anchored.target_kl > 0 else "target_diversity"
        raise ConfigError(f"config.anchored.{key} = {anchored[key]}: {error}") from error


def _strength_of_law(samples: BaseSamples, config: FrozenConfigDict) -> float:
    anchored = config.anchored
    if anchored.target_kl > 0:
        return frontier.strength_for_kl(samples.rewards, anchored.target_kl)
    if anchored.target_diversity > 0:
        draws, score = _draws(samples, config)
        base, error = frontier.diversity(draws, 0.0, score)
        most = math.floor(1000 * (1 - error / base)) / 1000
        if anchored.target_diversity > most:
            raise ConfigError(
                "a share this near to 1 cannot be told from it, as the base's Vendi score is "
                f"{base:.3f} +- {error:.2g} by these samples; it takes at most {most}."
            )
        return frontier.strength_for_share(draws, anchored.target_diversity, score)
    return anchored.strength


def _draws(samples: BaseSamples, config: FrozenConfigDict) -> tuple[frontier.Draws, frontier.Score]:
    """Sets of base images, and their Vendi score."""
    assert samples.features is not None
    draws = frontier.Draws.of(samples.rewards, SET_SIZE, REPEATS, config.seed)
    return draws, frontier.of_features(samples.features, vendi_score)


def _said(samples: BaseSamples, strength: float, config: FrozenConfigDict) -> str:
    """What the exact law of this strength is, by the base samples."""
    base, law = frontier.point(samples.rewards, 0.0), frontier.point(samples.rewards, strength)
    tilt = TILT.format(strength=strength, reward=law.reward, base=base.reward, kl=law.kl)
    if samples.features is None:
        return tilt
    draws, score = _draws(samples, config)
    vendi, of_base = (frontier.diversity(draws, at, score)[0] for at in (strength, 0.0))
    return TILT_VENDI.format(tilt=tilt, vendi=vendi, n=SET_SIZE, base=of_base)


def draw_base_samples(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> BaseSamples:
    """`anchored.base_images` images of each of the first `anchored.base_prompts` training prompts, by the ODE.

    Image n of prompt p has noise keyed by (seed, p, n); every process makes the prompts whose number it has, counted
    around. Collective.
    """
    config, accelerator = settings.config, policy.accelerator
    chosen = list(range(min(config.anchored.base_prompts, len(prompts))))
    encode = _encoder(config, policy) if config.anchored.target_diversity > 0 else None
    policy.encode_ahead([prompts.prompts[prompt] for prompt in chosen])
    found = []
    for first in run.progress(range(0, len(chosen), accelerator.num_processes), "base samples"):
        of_all = chosen[first : first + accelerator.num_processes]
        mine = of_all[accelerator.process_index :][:1]  # none, at the end
        parts = []
        for numbers in torch.arange(config.anchored.base_images).split(config.train.batch_size):
            run.check_stop()  # collective: as often on every process
            drawn = mine or policy.stand_in(of_all)
            parts += [_some_of_prompt(policy, prompts, reward, settings, prompt, numbers, encode) for prompt in drawn]
        found += [(prompt, *_joined(parts)) for prompt in mine]
    rows = sorted(gather_object(found), key=lambda row: row[0])
    return BaseSamples(
        rewards=np.stack([rewards for _, rewards, _, _ in rows]),
        variance=float(np.mean([variance for _, _, variance, _ in rows])),
        features=np.stack([features for _, _, _, features in rows]) if config.anchored.target_diversity > 0 else None,
    )


# Rewards (n,), latents (n, C, h, w) and features (n, d) of some images of one prompt.
Part = tuple[np.ndarray, torch.Tensor, np.ndarray | None]


def _some_of_prompt(
    policy: Policy,
    prompts: PromptDataset,
    reward: WeightedReward,
    settings: Settings,
    prompt: int,
    numbers: torch.Tensor,
    encode: Callable[[torch.Tensor], np.ndarray] | None,
) -> Part:
    """The images of these numbers, sampled together by the base model's weights."""
    config, texts = settings.config, [prompts.prompts[prompt]] * len(numbers)
    generators = [keyed_generator(config.seed, "base", prompt, n) for n in numbers.tolist()]
    velocity = policy.reference_velocity(policy.encode(texts), config.sample.guidance_scale)
    with torch.no_grad():
        sigmas = policy.sigmas(config.sample.num_steps)
        x0 = pipeline_with_logprob(velocity, policy.noise(generators), sigmas).final_latents
        images = policy.decode(x0)
        scores = reward(images, texts, [prompts.metadata[prompt]] * len(numbers))
    features = None if encode is None else encode(images.cpu())
    return scores.total.double().cpu().numpy(), x0.double().cpu(), features


def _joined(parts: Sequence[Part]) -> tuple[np.ndarray, float, np.ndarray | None]:
    """Rewards (N,), the variance of the latents, features (N, d) of all images of one prompt."""
    rewards, latents, features = zip(*parts, strict=True)
    variance = torch.cat(latents).var(0, correction=1).mean().item()
    return np.concatenate(rewards), variance, None if features[0] is None else np.concatenate(features)


def _encoder(config: FrozenConfigDict, policy: Policy) -> Callable[[torch.Tensor], np.ndarray]:
    """The features in which the evaluation measures diversity."""
    chosen = config.diversity
    return load_extractor(chosen.extractor, chosen.model, chosen.pretrained, policy.device, chosen.batch_size)
