"""Run by test_processes.py on some processes: an epoch's gradient by every method, and samples, saved."""

import os
import sys

import torch
from ml_collections import ConfigDict

from flow_grpo import places
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.launch import launch
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import declare
from flow_grpo.recipes.registry import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.settings import resolve

OF_GRPO = ("shaped", "held", "composed")  # GRPO with what composes with it
OF_DRTUNE = ("composed_drtune",)
# Of each kind of loop, those that ask most of sharded weights: chains that are run again in the backward pass, products
# with the base's Jacobian, base samples, images left out.
SHARDED = ("grpo", "drtune", "anchored", "alignprop", "adjoint_matching", "fdfo", "nsr", "held")
NAMES = (
    *METHODS,
    "nsr",
    *OF_GRPO,
    *OF_DRTUNE,
)  # `nsr` leaves images out, not as many everywhere


def configuration(name: str, models: str, logdir: str, sharding: str) -> ConfigDict:
    """3 groups of 4, of which two processes share one; FDFO's pairs of 2 likewise."""
    recipes = dict.fromkeys(OF_GRPO, "tiny_grpo") | dict.fromkeys(OF_DRTUNE, "tiny_drtune")
    config = get_config(recipes.get(name, f"tiny_{name}"))
    if name.startswith("composed"):  # by what the images of both processes have seen
        declare(config, ["reward_constraint.clipscore"])
        config.reward_normalise, config.reward_constraint.clipscore, config.reward_augment = True, 0.5, 0.1
        config.reward_fn.clipscore, config.reward_model.clipscore = 0.5, f"{models}/judge"
    if name == "shaped":  # by what an image adds to a group that two processes share, and by its ranks in it
        config.shaping.kind, config.shaping.weight = "vendi", 0.1
        config.shaping.gate_share, config.shaping.gate_rewards = 0.25, ("clipscore",)
        config.reward_model.clipscore = f"{models}/judge"
    if name == "held":  # to the base's images, of which two processes draw 3 and 2, and by its own densities
        config.shaping.kind, config.shaping.weight = "density", 0.1
        config.train.forward_kl, config.forward_kl.images = 0.1, 5
    config.logdir, config.run_name, config.trackers = logdir, f"{name}_{sharding}", ()
    config.pretrained.model, config.reward_model.pickscore = f"{models}/sd3", f"{models}/clip"
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.eval.judge, config.eval.modes, config.eval_diversity = f"{models}/judge", "", False
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.batch_size = 1, 7, 3
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 2 if name == "fdfo" else 4
    config.sample.batch_size = config.train.batch_size = 3
    config.sample.num_steps, config.train.updates_per_epoch = 5, 1
    config.anchored.base_images, config.anchored.base_prompts = (4, 3) if name == "anchored" else (64, 16)
    config.sharding = sharding
    if name != "nsr" and not method_of(config).needs_base:
        config.train.beta = 0.1
    return config


def main(models: str, out: str) -> None:
    """Several processes do some of it with sharded weights too."""
    found, accelerator = {}, None
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    for name, sharding in [(n, "none") for n in NAMES] + [(n, "full") for n in SHARDED if several]:
        config = configuration(name, models, f"{out}-logs", sharding)
        if accelerator is None:
            settings, accelerator = launch(config)
        else:
            settings = resolve(config, accelerator.num_processes, cuda=False)
        policy = Policy.load(settings, accelerator)
        generator = torch.Generator().manual_seed(0)
        for weight, parameter in policy.named_trainable.items():  # the gradient of LoRA's A is zero until B is not
            noise = torch.randn(policy.weights.shape(weight), generator=generator)
            parameter.data += 0.02 * policy.weights.part(weight, noise)
        policy.optimizer.step = policy.optimizer.zero_grad = lambda: None  # keep the gradient
        prompts = PromptDataset.load(config.prompts.train)
        run, reward = Run(settings, accelerator), build_reward(settings.config, accelerator.device)
        metrics = places.load(method_of(settings.config).loop)(policy, prompts, reward, settings, run)
        samples = draw_samples(policy, prompts, settings, run) if name == "grpo" else None
        gradient = [policy.weights.whole(weight, p.grad) for weight, p in policy.named_trainable.items()]
        key = name if sharding == "none" else f"{name}_sharded"
        found[key] = {"gradient": torch.cat([g.flatten() for g in gradient]) if run.is_main else None}
        found[key] |= {"metrics": metrics}
        if samples is not None:
            found[key] |= {"images": samples.images, "latents": samples.latents}
    if run.is_main:
        torch.save(found, out)
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
