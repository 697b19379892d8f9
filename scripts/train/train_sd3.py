"""Fine-tune a Stable Diffusion 3 model with a reward: GRPO, or DRTune if `config.use_reward_gradient`.

    accelerate launch scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3
    python scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3_use_gradient --config.train.beta=0.02

Recipes are in config/grpo.py, every key in config/base.py. Departures from the papers' code: a process's gradients are
averaged once per update instead of by DistributedDataParallel; an epoch's images are divided among updates in a fixed
way, so that the result does not depend on the number of processes; step log-probabilities are kept in float32.
"""

from flow_grpo.commands import cli


def main(config) -> None:
    """Wire the parts together and train."""
    from flow_grpo import checkpoint, drtune, grpo
    from flow_grpo.evaluation import Evaluator, build_evaluators
    from flow_grpo.evaluators.diversity import build_diversity_evaluators
    from flow_grpo.launch import launch, one_of_many
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.rewards import build_reward
    from flow_grpo.runs.stopping import watching
    from flow_grpo.tracking import Run
    from flow_grpo.trainer import fit

    with watching() as stop, one_of_many(stop):
        settings, accelerator = launch(config)
        config = settings.config
        train_epoch = drtune.train_epoch if config.use_reward_gradient else grpo.train_epoch
        prompts, test_prompts = PromptDataset.load(config.prompts.train), PromptDataset.load(config.prompts.test)
        with Run(settings, accelerator, stop) as run:
            reward = build_reward(config, accelerator.device)
            policy = Policy.load(settings, accelerator)
            evaluators: list[Evaluator] = build_evaluators(policy, reward, settings, run)
            evaluators += build_diversity_evaluators(settings, run, accelerator.device)
            due = checkpoint.resume(policy, run, settings)
            fit(policy, train_epoch, prompts, test_prompts, reward, evaluators, settings, run, due)


if __name__ == "__main__":
    cli.run(main, __doc__)
