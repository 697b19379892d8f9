"""Signal, noise and direction of GRPO's gradient under each form of the likelihood ratio, at the base model.

    python scripts/study/gradient_noise.py [--out assets/study] [--batches 64] [--exact_batches 16]

g is the gradient of GRPO's loss at the sampling weights, where r = 1 and nothing is clipped: -A d log_prob / d theta,
averaged over a batch's images and slots. A batch is one group of 8 images of a prompt drawn at random; the forms that
score steps train 2 of its steps, drawn at random too (the exact trace can then be had), those that score images all of
the image. A form with the exact trace meets the first of the batches that the others meet.

Written to gradient_noise.json, for every form:

    probes    |E g|^2 / E|g - E g|^2 over other probes (or draws) for the same images: 1 / the noise that probes add.
    batches   the same over other images, steps and probes.
    uphill    E<-g, h> / (|h| sqrt(E|g|^2)): of the length of a step along -g, the share that points up the reward.
    cosine    E<-g, h> / (|h| |E g|): the same without the noise.
    over_sde  uphill minus that of `sde` on the same batches.

h is the gradient of the mean reward of the evaluation's sampler, backpropagated through all of its steps. Squares of
means are estimated without bias, by products of different batches. Intervals are the jackknife's over batches, at 95 %.
Where too few batches were drawn to tell E g from zero, there is no cosine: null. The optimizer rescales g (AdamW), and
an update has more groups than one: what is compared is the forms.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flow_grpo.commands import cli
from flow_grpo.statistics import Estimate, Interval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.study.paths import NOISE, OUT
from scripts.study.testbeds import SEARCH_SEED

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from flow_grpo.loops.policy_gradient import Experience
    from flow_grpo.policy import Policy
    from flow_grpo.rewards.building import WeightedReward
    from flow_grpo.settings import Settings

RECIPE, SEED = "tiny_sd3", SEARCH_SEED  # a seed that no claim uses
GRPO: Mapping[str, Any] = {  # its best settings of nine that were tried: the highest reward after 90 s on one core
    "train.learning_rate": 3e-3,
    "train.clip_range": 1e-3,
    "train.updates_per_epoch": 4,
    "sample.num_steps": 5,
}
FORMS = (  # of the ratio, with probes or draws; 0: the exact trace. The others are held against the first
    ("sde", 1), ("cfm", 5), ("ode_step", 1), ("ode_step", 4), ("ode_step", 16), ("ode_step", 0), ("ode_path", 1),
    ("ode_path", 4),
)  # fmt: skip
STEPS_OF_A_BATCH = 2
REPEATS, REPEATED_BATCHES = 4, 12  # probes drawn for each of so many batches
REWARD_BATCHES, REWARD_IMAGES = 16, 40


# --- statistics of gradients, (n, P): one row a batch -----------------------------------------------------


def squared_mean(gram: np.ndarray) -> float:
    """|E g|^2 without bias, from the products (n, n) of n independent g: the mean of those of different ones."""
    n = len(gram)
    return float((gram.sum() - gram.trace()) / (n * (n - 1)))


def signal_to_noise(gram: np.ndarray) -> float:
    """|E g|^2 / E|g - E g|^2 of n independent g, from their products (n, n)."""
    signal = squared_mean(gram)
    return signal / (mean_square(gram) - signal)


def jackknife(statistic: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """A statistic of all of `count` observations, and its standard error from leaving out each; nan if any is."""
    everything = np.arange(count)
    left_out = np.array([statistic(np.delete(everything, i)) for i in everything])
    return statistic(everything), math.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum())


def _interval(value: float, error: float, count: int) -> Interval:
    return Estimate(value, error, count - 1).interval()


def noise_of_batches(gradients: np.ndarray) -> Interval:
    """Signal-to-noise over batches, (n, P)."""
    gram = gradients @ gradients.T
    return _interval(*jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)]), len(gram)), len(gram))


def noise_of_repeats(gradients: np.ndarray) -> Interval:
    """Signal-to-noise over the R repetitions of each of n batches, (n, R, P): signals and noises averaged over them."""
    signals, noises = [], []
    for repeats in gradients:
        gram = repeats @ repeats.T
        signals.append(squared_mean(gram))
        noises.append(mean_square(gram) - signals[-1])
    signal, noise = np.array(signals), np.array(noises)
    return _interval(*jackknife(lambda kept: signal[kept].mean() / noise[kept].mean(), len(signal)), len(signal))


def direction(gradients: np.ndarray, uphill: np.ndarray) -> dict[str, Interval]:
    """Where descent along gradients (n, P) leads, seen from `uphill` (m, P); each row estimates one gradient.

    Returns:
        `uphill` and `cosine` of the module's docstring, with both sides' errors. The cosine is nan unless the
        signal of `gradients` lies above zero by its own interval.
    """
    n, own = len(gradients), gradients @ gradients.T
    signal = _interval(*jackknife(lambda kept: squared_mean(own[np.ix_(kept, kept)]), n), n)
    cosine = Interval(math.nan)
    if signal.low > 0:
        cosine = _over_both(_share(gradients, uphill, squared_mean), n, len(uphill))
    return {"uphill": _over_both(_share(gradients, uphill, mean_square), n, len(uphill)), "cosine": cosine}


def uphill_difference(first: np.ndarray, second: np.ndarray, uphill: np.ndarray) -> Interval:
    """`uphill` of first (n, P) minus that of second (n, P), whose rows belong to the same batches."""
    one, other = (_share(gradients, uphill, mean_square) for gradients in (first, second))
    return _over_both(lambda rows, columns: one(rows, columns) - other(rows, columns), len(first), len(uphill))


def mean_square(gram: np.ndarray) -> float:
    """E|g|^2, from the products (n, n) of n g."""
    return float(gram.trace()) / len(gram)


Share = Callable[[np.ndarray, np.ndarray], float]  # of some batches of g, and some of h


def _share(gradients: np.ndarray, uphill: np.ndarray, power: Callable[[np.ndarray], float]) -> Share:
    """E<-g, h> over the root of |E h|^2 times `power` of g."""
    cross, own, other = -gradients @ uphill.T, gradients @ gradients.T, uphill @ uphill.T

    def share(rows: np.ndarray, columns: np.ndarray) -> float:
        lengths = power(own[np.ix_(rows, rows)]) * squared_mean(other[np.ix_(columns, columns)])
        return float(cross[np.ix_(rows, columns)].mean()) / math.sqrt(lengths) if lengths > 0 else math.nan

    return share


def _over_both(share: Share, n: int, m: int) -> Interval:
    """With the errors of n batches of g and m of h, which are independent."""
    value, error = jackknife(lambda rows: share(rows, np.arange(m)), n)
    _, other = jackknife(lambda columns: share(np.arange(n), columns), m)
    return _interval(value, math.hypot(error, other), min(n, m))


# --- gradients of the model -------------------------------------------------------------------------------


def recipe(changes: Mapping[str, Any]) -> ConfigDict:
    """The tuned GRPO, with some keys changed."""
    from flow_grpo.recipes.registry import get_config

    config = get_config(RECIPE)
    config.update_from_flattened_dict({**GRPO, "seed": SEED, "num_threads": 1, **changes})
    return config


def batch_settings(form: str, probes: int) -> Settings:
    """Of one batch: a group of the recipe's size, in one update."""
    from flow_grpo.settings import resolve

    one = {"sample.groups_per_epoch": 1, "train.updates_per_epoch": 1}
    config = recipe({**one, "train.ratio": form, "train.ratio_probes": probes})
    return resolve(config, num_processes=1, cuda=False)


def rollout(policy: Policy, reward: WeightedReward, settings: Settings, number: int) -> Experience:
    """The images of batch `number`, with their advantages; its prompt is drawn independently of the others'."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import torch

    from flow_grpo.loops.policy_gradient import collect
    from flow_grpo.metrics import MeanMetrics
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.randomness import keyed_generator
    from flow_grpo.rewards.composition import Composition
    from flow_grpo.runs.phases import Phases
    from flow_grpo.runs.run import Counters
    from flow_grpo.types import PromptBatch

    config, size = settings.config, settings.plan.group_size
    dataset = PromptDataset.load(config.prompts.train)
    drawn = int(torch.randint(len(dataset), (), generator=keyed_generator(config.seed, "batch prompt", number)))
    batch = PromptBatch(
        prompts=(dataset.prompts[drawn],) * size,
        metadata=(dataset.metadata[drawn],) * size,
        sample_ids=torch.arange(size),
        group_ids=torch.zeros(size, dtype=torch.int64),
    )
    run = SimpleNamespace(
        counters=Counters(epoch=number), progress=lambda items, _: items, check_stop=lambda **_: None,
        phase=Phases(torch.device("cpu")), composition=Composition(config), failing_together=nullcontext,
    )  # fmt: skip
    return collect(policy, batch, reward, settings, cast("Any", run), MeanMetrics())


def loss_gradient(policy: Policy, experience: Experience, settings: Settings, repeat: int = 0) -> np.ndarray:
    """g of a batch under the form that `settings` names, (P,) float64; `repeat` draws its probes anew."""
    import torch

    from flow_grpo.likelihood_ratio import RatioKeys, likelihood_of
    from flow_grpo.randomness import keyed_generator

    config, likelihood = settings.config, likelihood_of(settings.config)
    velocity = policy.velocity(policy.encode(experience.prompts), config.sample.guidance_scale)
    keys = RatioKeys(config.seed + repeat, experience.epoch, 0, tuple(experience.sample_ids.tolist()))
    generator = keyed_generator(config.seed, "slots", experience.epoch)
    slots = torch.randperm(likelihood.slots(experience.trajectory), generator=generator)[:STEPS_OF_A_BATCH].tolist()
    for slot in slots:
        log_prob = likelihood.score(velocity, experience.trajectory, keys, slot).log_prob
        (-(experience.advantages * log_prob).mean() / len(slots)).backward()
    return _taken(policy)


def reward_gradient(policy: Policy, reward: WeightedReward, settings: Settings, number: int) -> np.ndarray:
    """h of one batch of images of the evaluation's sampler, (P,) float64: uphill, through every step."""
    from flow_grpo.diffusers_patch.rollout import ode_steps, rollout
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.randomness import keyed_generator

    evaluation, prompts = settings.config.eval, PromptDataset.load(settings.config.prompts.train).prompts
    chosen = [prompts[i % len(prompts)] for i in range(REWARD_IMAGES)]
    velocity = policy.velocity(policy.encode(chosen), evaluation.guidance_scale)
    x = policy.noise([keyed_generator(SEED, "reward gradient", number, i) for i in range(REWARD_IMAGES)])
    sigmas = policy.sigmas(evaluation.num_steps).tolist()
    for taken in rollout(velocity, x, sigmas, ode_steps(sigmas), enable_grad=True):
        x = taken.next_latents
    reward(policy.decode(x), chosen, [{}] * len(chosen)).total.mean().backward()
    return _taken(policy)


def _taken(policy: Policy) -> np.ndarray:
    """The accumulated gradient, which is cleared."""
    import torch

    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable]
    policy.optimizer.zero_grad()
    return torch.cat([gradient.flatten() for gradient in found]).double().cpu().numpy()


# --- the command ------------------------------------------------------------------------------------------


def measure(batches: int, exact_batches: int) -> list[dict[str, Any]]:
    """The rows of gradient_noise.json."""
    from tqdm import tqdm

    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy
    from flow_grpo.rewards.building import build_reward

    settings, accelerator = launch(recipe({}))
    policy, reward = Policy.load(settings, accelerator), build_reward(settings.config, accelerator.device)
    sampling = batch_settings("sde", 1)
    rollouts = [rollout(policy, reward, sampling, i) for i in tqdm(range(batches), "rollouts")]
    uphill = np.stack([reward_gradient(policy, reward, settings, i) for i in tqdm(range(REWARD_BATCHES), "reward")])
    rows: list[dict[str, Any]] = []
    control = np.empty(0)
    for form, probes in FORMS:
        of_form, exact = batch_settings(form, probes), probes == 0
        name = f"{form} {'exact' if exact else probes}"
        used = rollouts[: exact_batches if exact else batches]
        gradients = np.stack([loss_gradient(policy, experience, of_form) for experience in tqdm(used, name)])
        found = {"batches": noise_of_batches(gradients), **direction(gradients, uphill)}
        if form == "sde":
            control = gradients
        else:
            found["over_sde"] = uphill_difference(gradients, control[: len(used)], uphill)
        if form != "sde" and not exact:
            again = [
                [first, *(loss_gradient(policy, experience, of_form, repeat) for repeat in range(1, REPEATS))]
                for first, experience in zip(
                    gradients[:REPEATED_BATCHES], tqdm(rollouts[:REPEATED_BATCHES], f"{name}, repeated"), strict=True
                )
            ]
            found["probes"] = noise_of_repeats(np.array(again))
        rows += [
            {"form": form, "probes": probes, "source": source, "batches": len(used), **_ends(interval)}
            for source, interval in found.items()
        ]
    return rows


def _ends(interval: Interval) -> dict[str, float]:
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: assets/study)")
    parser.add_argument("--batches", type=int, default=64, help="of every form but the exact trace (default: 64)")
    parser.add_argument("--exact_batches", type=int, default=16, help="of the exact trace (default: 16)")
    args = parser.parse_args(arguments)
    least, most = REPEATED_BATCHES, args.batches
    if args.batches < least:
        parser.error(f"--batches {args.batches} is not allowed; it takes at least {least}")
    if not 3 <= args.exact_batches <= most:
        parser.error(f"--exact_batches {args.exact_batches} is not allowed; it takes 3 to --batches, {most}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    from flow_grpo.training.weights import output_folder
    from scripts.study.outcomes import write_rows

    args = parse(arguments)
    with cli.one_sentence_errors():
        path = output_folder(args.out) / NOISE
        write_rows(measure(args.batches, args.exact_batches), path)


if __name__ == "__main__":
    main()
