"""Run by tests/training/test_reward_failures.py on two processes: a training whose reward's server goes away."""

import sys
from pathlib import Path

from flow_grpo.errors import TrainingStopped
from flow_grpo.launch import launch
from flow_grpo.loops import policy_gradient
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.training import checkpoint
from flow_grpo.training.trainer import fit
from tests.training.test_reward_failures import served


def main(models: str, folder: str, address: str) -> None:
    config = get_config()
    config.logdir, config.run_name, config.trackers = f"{folder}/logs", "run", ()
    config.pretrained.model = f"{models}/sd3"
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.eval.judge, config.eval.modes, config.eval_diversity = "", "", False
    config.eval_freq = config.save_freq = 0
    config.sample.num_steps, config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 4, 4, 2
    config.train.updates_per_epoch = 1
    served(config, address)
    config.sample.batch_size = config.train.batch_size = 2
    settings, accelerator = launch(config)
    policy, prompts = Policy.load(settings, accelerator), PromptDataset.load(config.prompts.train)
    reward, loop = build_reward(settings.config, accelerator.device), policy_gradient.train_epoch
    with Run(settings, accelerator) as run:
        checkpoint.resume(policy, run, settings)
        try:
            fit(policy, loop, prompts, prompts, reward, [], settings, run, False)
        except TrainingStopped as error:
            Path(folder, f"process{accelerator.process_index}").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
