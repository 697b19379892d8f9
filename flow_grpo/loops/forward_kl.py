"""An anchor that composes with every method: the flow-matching loss on the base model's own images (arXiv 2512.04332).

    weight * E |v_theta(x_t, t) - (e - x_0)|^2,    x_t = (1 - t) x_0 + t e,    x_0 by the base model

stands for the forward KL divergence from the base's law to the trained one: where the base has images that the weights
no longer make, it rises, whatever the reward says of them. Velocities are those without guidance, as
in the evaluator of the same name, flow_grpo/evaluators/forward_kl.py.

The images are a fixed set, keyed by (seed, n): the same in every session and on any number of processes. Updates take
them in turn, in keyed orders; their times and noises are keyed by the update, and by the image's place in it.
"""

from __future__ import annotations

import torch
from accelerate.utils import gather_object
from torch import Tensor

from flow_grpo.forward_process import matching_errors, noised, stratified_times
from flow_grpo.policy import UNGUIDED, Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator, keyed_stream
from flow_grpo.runs.run import Run
from flow_grpo.types import BaseImages


def accumulate_forward_kl(policy: Policy, run: Run, weight: float) -> Tensor:
    """Add weight times the loss's gradient to that of the present update. Collective.

    An update takes as many base images as it has of its own; each process its share.

    Returns:
        The loss of this process's images, mean over images, times and dimensions: scalar, without the weight.
    """
    config, count = policy.settings.config, policy.settings.plan.images_per_update
    if policy.base_images is None:
        policy.base_images = _paid_once(policy, run)
    base, update = policy.base_images, run.counters.updates + run.counters.nonfinite_updates
    total = count * policy.settings.num_processes
    chosen = keyed_stream(len(base.prompts), config.seed, "forward KL order", start=update * total, count=total)
    times = stratified_times(config.forward_kl.draws, keyed_generator(config.seed, "forward KL times", update))
    own = count * policy.accelerator.process_index + torch.arange(count)  # places in the update
    loss = torch.zeros((), device=policy.device)
    for places in own.split(config.train.batch_size):
        images = [chosen[place] for place in places.tolist()]
        x_0 = base.latents[images].to(policy.device)
        velocity = policy.velocity(policy.encode([base.prompts[i] for i in images]), UNGUIDED)
        generators = [keyed_generator(config.seed, "forward KL", update, place) for place in places.tolist()]
        for t in times:
            errors = matching_errors(velocity, noised(x_0, policy.noise(generators), t))
            share = errors.sum() / count / len(times)
            policy.accelerator.backward(weight * share)
            loss += share.detach()
    return loss


def _paid_once(policy: Policy, run: Run) -> BaseImages:
    """The base images; of a run that goes on, which has drawn them before, they are not counted again."""
    if not run.resumed or run.counters.epoch == 0:
        return draw_base_images(policy, run)
    spent = policy.network_evaluations
    with run.uncounted():
        images = draw_base_images(policy, run)
    policy.network_evaluations = spent
    return images


@torch.no_grad()
def draw_base_images(policy: Policy, run: Run) -> BaseImages:
    """`forward_kl.images` images of the first training prompts, in turn; processes share them, every one gets all."""
    config, accelerator = policy.settings.config, policy.accelerator
    known = PromptDataset.load(config.prompts.train).prompts
    prompts = [known[n % len(known)] for n in range(config.forward_kl.images)]
    policy.encode_ahead(prompts)
    found: list[tuple[int, Tensor]] = []
    rounds = torch.arange(len(prompts)).split(config.sample.batch_size * accelerator.num_processes)
    for part in run.progress(rounds, "base images"):
        run.check_stop()  # collective: as often on every process
        mine = part[accelerator.process_index :: accelerator.num_processes].tolist()
        drawn = mine or policy.stand_in(part.tolist())
        generators = [keyed_generator(config.seed, "forward KL image", n) for n in drawn]
        if drawn:
            latents = policy.sample_base([prompts[n] for n in drawn], generators, config.sample.num_steps)
            found += zip(mine, latents[: len(mine)].cpu(), strict=True)
    images = sorted(gather_object(found), key=lambda image: image[0])
    return BaseImages(tuple(prompts), torch.stack([latents for _, latents in images]))
