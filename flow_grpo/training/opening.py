"""The parts of a training run, wired together: what a command opens, and then fits by a method of its choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ml_collections import ConfigDict

from flow_grpo import places
from flow_grpo.evaluators.base import Evaluator
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.launch import launch, one_of_many
from flow_grpo.methods.base import Method
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset, training_prompts
from flow_grpo.rewards.building import WeightedReward, build_reward
from flow_grpo.runs.run import Run
from flow_grpo.runs.stopping import watching
from flow_grpo.settings import Settings
from flow_grpo.training import checkpoint, words
from flow_grpo.training.trainer import fit


@dataclass(frozen=True)
class Training:
    """Everything of a run that is about to train, its earlier state loaded where it goes on."""

    policy: Policy
    prompts: PromptDataset
    test_prompts: PromptDataset
    reward: WeightedReward
    evaluators: Sequence[Evaluator]
    settings: Settings
    run: Run
    evaluation_due: bool  # whether the present weights are evaluated first

    def fit(self, method: Method) -> None:
        """Train to the configured end by a method; raises as `trainer.fit` does."""
        fit(
            self.policy,
            places.load(method.loop),
            self.prompts,
            self.test_prompts,
            self.reward,
            self.evaluators,
            self.settings,
            self.run,
            self.evaluation_due,
        )


@contextmanager
def open_training(config: ConfigDict) -> Iterator[Training]:
    """Check, launch and load what a configuration describes, and close its run afterwards; signals are watched inside.

    Raises:
        ConfigError: see `launch.launch`, `tracking.Run` and the parts that load.
        TrainingStopped, Interrupted: the training cannot go on, or was asked to stop.
    """
    with watching() as stop, one_of_many(stop):
        settings, accelerator = launch(config)
        config = settings.config
        prompts, test_prompts = training_prompts(config), PromptDataset.load(config.prompts.test)
        with Run(settings, accelerator, stop) as run:
            for said in (words.unread_negatives(config), words.not_sharded(config, settings.num_processes)):
                if said:
                    run.tell(said)
            reward = build_reward(config, accelerator.device)
            reward.heed(lambda: stop.reason() is not None)
            policy = Policy.load(settings, accelerator)
            evaluators = build_evaluators(policy, reward, settings, run)
            due = checkpoint.resume(policy, run, settings)
            yield Training(policy, prompts, test_prompts, reward, evaluators, settings, run, due)
        run.tell(words.ends(run.folder, run.counters.epoch))  # after what a tracker says at its own end
