"""Fine-tune a Stable Diffusion 3 model with a reward: GRPO, or DRTune if `config.use_reward_gradient`.

    accelerate launch scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3
    python scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3_use_gradient --config.train.beta=0.02

Recipes are in config/grpo.py, every key in config/base.py; `fme train` is the same from any folder. Departures from
the papers' code: a process's gradients are averaged once per update instead of by DistributedDataParallel; an epoch's
images are divided among updates in a fixed way, so that the result does not depend on the number of processes; step
log-probabilities are kept in float32.
"""

from flow_grpo.commands import cli


def main(config) -> None:
    """Open what the configuration describes, and train by the method that it names."""
    from flow_grpo.methods import grpo
    from flow_grpo.methods import reward_gradient as drtune
    from flow_grpo.training.opening import open_training

    with open_training(config) as training:
        training.fit(drtune.train_epoch if config.use_reward_gradient else grpo.train_epoch)


if __name__ == "__main__":
    cli.run(main, __doc__)
