"""Run by tests/training/test_trainer.py on two processes: a training that a guard ends, and where each ended."""

import sys
from pathlib import Path

from flow_grpo.evaluators.base import Measured
from flow_grpo.launch import launch
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.training.trainer import fit


class Scripted:
    """A metric whose value at each epoch is given; the base's record has it too."""

    name, collective, request, freq = "scripted", False, None, 1

    def __init__(self, run, metric, values):
        self.run, self.metric, self.values = run, metric, values

    def evaluate(self, samples):
        return Measured({self.metric: self.values[self.run.counters.epoch]})


def main(models: str, out: str) -> None:
    config = get_config()
    config.logdir, config.run_name, config.trackers = f"{out}-logs", "run", ()
    config.pretrained.model, config.reward_fn.pickscore = f"{models}/sd3", 1.0
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.reward_model.pickscore, config.eval.judge, config.eval.modes = f"{models}/clip", f"{models}/judge", ""
    config.eval_diversity, config.eval.num_image_per_prompt, config.eval.num_steps = False, 2, 2
    config.eval_freq, config.eval.ema, config.num_epochs, config.guard.patience = 1, False, 5, 2
    settings, accelerator = launch(config)
    policy, prompts = Policy.load(settings, accelerator), PromptDataset.load(config.prompts.train)
    reward, said = build_reward(settings.config, accelerator.device), []
    with Run(settings, accelerator) as run:
        tell = run.tell
        run.tell = lambda text, key="": (said.append(text), tell(text, key))[1]
        scripted = Scripted(run, "judge/accuracy", [0.5, 0.8, 0.7, 0.8, 0.9, 0.9])
        fit(policy, lambda *_: {"reward": 0.0}, prompts, prompts, reward, [scripted], settings, run)
        Path(f"{out}-process{accelerator.process_index}").write_text(str(run.counters.epoch))
        if run.is_main:
            Path(out).write_text("\n".join(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
