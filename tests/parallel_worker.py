"""Run by test_parallel.py on three processes: the same trainings with replicated weights and with sharded ones."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from flow_grpo import places
from flow_grpo.evaluators.evaluation import evaluate
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.launch import launch
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.sd3 import get_config
from flow_grpo.rewards import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.settings import resolve
from flow_grpo.training.state import collect, gathered

EPOCHS = 2


def guided(config: ConfigDict) -> None:
    """Two passes of DRTune under guidance, the LoRA regressed to the base's velocity."""
    config.drtune.two_pass, config.sample.guidance_scale, config.train.beta = True, 2.0, 0.1


def full(config: ConfigDict) -> None:
    """All weights, with a frozen copy of them; activations are computed again."""
    config.use_lora, config.train.beta, config.gradient_checkpointing = False, 0.1, True


def uneven(config: ConfigDict) -> None:
    """Only bad images teach, not as many on every process; frozen weights in bf16."""
    config.train.advantage_mode, config.mixed_precision = "negative", "bf16"


def density(config: ConfigDict) -> None:
    config.train.ratio = "ode_step"


TRAININGS: dict[str, tuple[str, Callable[[ConfigDict], None]]] = {
    "guided": ("drtune", guided),
    "full": ("grpo", full),
    "uneven": ("grpo", uneven),
    "density": ("grpo", density),
}


def configuration(name: str, models: str, logdir: str, sharding: str) -> ConfigDict:
    method, change = TRAININGS[name]
    config = get_config(f"tiny_{method}")
    config.logdir, config.run_name, config.trackers = logdir, f"{name}_{sharding}", ()
    config.pretrained.model, config.reward_model.pickscore = f"{models}/sd3", f"{models}/clip"
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.eval.judge, config.eval.modes, config.eval_diversity = "", "", False
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 4
    config.sample.batch_size = config.train.batch_size = 2
    config.sample.num_steps, config.train.updates_per_epoch, config.drtune.num_train_steps = 4, 1, 2
    config.sharding = sharding
    change(config)
    return config

def main(models: str, out: str) -> None:
    found, accelerator = {}, None
    for sharding in ("none", "full"):
      for name in sys.argv[3:] or TRAININGS:
        config = configuration(name, models, f"{out}-logs", sharding)
        if accelerator is None:
            settings, accelerator = launch(config)
        else:
            settings = resolve(config, accelerator.num_processes, cuda=False)
        policy = Policy.load(settings, accelerator)
        prompts = PromptDataset.load(config.prompts.train)
        run, reward = Run(settings, accelerator), build_reward(settings.config, accelerator.device)
        for _ in range(EPOCHS):
            metrics = places.load(method_of(settings.config).loop)(policy, prompts, reward, settings, run)
            run.counters.epoch += 1
        state = gathered(policy, collect(policy, run, True))
        if run.is_main:
            found[name, sharding] = {"tensors": dict(state.tensors), "metrics": metrics}
    if run.is_main:
        torch.save(found, out)
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:3])
