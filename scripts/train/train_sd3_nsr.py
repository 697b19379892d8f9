"""Negative-sample reinforcement of a Stable Diffusion 3 model, with every evaluator along the run.

    accelerate launch scripts/train/train_sd3_nsr.py --config config/grpo.py:tiny_sd3_nsr
    python scripts/train/train_sd3_nsr.py --config config/grpo.py:tiny_sd3_nsr --config.train.advantage_mode=weighted

GRPO that only pushes away from the images below their group's mean ("negative"), or hardly pulls towards those above
("weighted": a tenth). arXiv 2506.01347 has it for language models and rewards of 0 or 1; here it acts on advantages
that are normalised within the group and continuous. All else is scripts/train/train_sd3.py.
"""

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.methods.registry import black_box

MODES = ("negative", "weighted")


def main(config) -> None:
    """Train by GRPO, if the configuration is one of negative-sample reinforcement."""
    if config.use_reward_gradient:
        raise ConfigError(
            "config.use_reward_gradient = True has no advantages to weigh; scripts/train/train_sd3_nsr.py takes False."
        )
    if config.train.advantage_mode not in MODES:
        raise ConfigError(
            f"config.train.advantage_mode = {config.train.advantage_mode!r} is not negative-sample reinforcement; "
            f"scripts/train/train_sd3_nsr.py takes {' or '.join(map(repr, MODES))}, others are train_sd3.py's."
        )
    from flow_grpo.training.opening import open_training

    with open_training(config) as training:
        training.fit(black_box(config))


if __name__ == "__main__":
    cli.run(main, __doc__)
