"""Fine-tune a flow-matching model with a reward: by black-box methods, or its gradient if `config.use_reward_gradient`.

    accelerate launch scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3
    python scripts/train/train_sd3.py --config config/grpo.py:tiny_sd3_use_gradient --config.train.beta=0.02

Recipes are in config/grpo.py, every key in docs/configuration.md; `fme train` is the same from any folder. Departures
from the papers' code: a process's gradients are averaged once per update instead of by DistributedDataParallel; an
epoch's images are divided among updates in a fixed way, so that the result does not depend on the number of processes;
step log-probabilities are kept in float32.
"""

from flow_grpo.commands import cli
from flow_grpo.methods.registry import black_box, reward_gradient


def main(config) -> None:
    """Open what the configuration describes, and train by the method that it names."""
    from flow_grpo.training.opening import open_training

    with open_training(config) as training:
        training.fit(reward_gradient(config) if config.use_reward_gradient else black_box(config))


if __name__ == "__main__":
    cli.run(main, __doc__)
