"""The negative-sample command: only images below their group's mean teach, and every evaluator runs along."""

from __future__ import annotations

import pytest

from tests import forked
from tests.scripts.test_train_sd3 import history, overrides

SCRIPT = "scripts/train/train_sd3_nsr.py"


def test_it_trains_with_every_evaluator_along_the_run(random_models, tmp_path):
    options = ["--config.eval_diversity_freq=2", "--config.eval_ode_log_prob_freq=2", "--config.visualize_steps_freq=2"]
    options += ["--config.entropy.num_image_per_prompt=2", "--config.eval.ema=False"]
    recipe = ["--config", "config/grpo.py:tiny_sd3_nsr", *overrides(random_models, tmp_path), *options]
    result = forked.run(SCRIPT, *recipe)
    assert result.returncode == 0, result.stderr
    lines = history(tmp_path)
    for line in (lines[0], lines[-1]):
        for name in ("reward/total", "judge/accuracy", "diversity/vendi", "diversity/rke_low", "entropy/nats"):
            assert line[f"eval/{name}"] is not None
    assert lines[0]["eval/reward/total"] != lines[-1]["eval/reward/total"]
    assert (tmp_path / "run/images/eval_strip_000002.png").is_file()
    assert (tmp_path / "run/diversity/eval_000002.json").is_file()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("tiny_sd3", "config.train.advantage_mode = 'all' is not negative-sample reinforcement"),
        ("tiny_sd3_use_gradient", "config.use_reward_gradient = True has no advantages"),
    ],
)
def test_what_is_not_negative_sample_reinforcement_is_one_sentence(recipe, says):
    result = forked.run(SCRIPT, "--config", f"config/grpo.py:{recipe}")
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
