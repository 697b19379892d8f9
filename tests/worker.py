"""Run by test_processes.py on one or two processes: one epoch's gradient and one evaluation's samples, saved."""

import sys

import torch

from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.launch import launch
from flow_grpo.loops import drtune
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards import build_reward
from flow_grpo.runs.run import Run


def main(method: str, models: str, out: str) -> None:
    config = get_config()
    config.logdir, config.run_name, config.trackers = f"{out}-logs", "run", ()
    config.use_reward_gradient = method == "drtune"
    config.pretrained.model, config.reward_fn.pickscore = f"{models}/sd3", 1.0
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.reward_model.pickscore, config.eval.judge, config.eval.modes = f"{models}/clip", f"{models}/judge", ""
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.batch_size = 1, 7, 3
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 4
    config.sample.batch_size = config.train.batch_size = 3
    config.sample.num_steps, config.train.updates_per_epoch, config.train.beta = 5, 1, 0.1
    settings, accelerator = launch(config)
    policy = Policy.load(settings, accelerator)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable:  # the gradient of LoRA's A is zero until B is not
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.optimizer.step = policy.optimizer.zero_grad = lambda: None  # keep the gradient
    prompts = PromptDataset.load(config.prompts.train)
    run = Run(settings, accelerator)
    train_epoch = (grpo if method == "grpo" else drtune).train_epoch
    train_epoch(policy, prompts, build_reward(settings.config, accelerator.device), settings, run)
    samples = draw_samples(policy, prompts, settings, run)
    if run.is_main:
        gradient = torch.cat([p.grad.flatten() for p in policy.trainable])
        torch.save({"gradient": gradient, "images": samples.images, "latents": samples.latents}, out)
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
