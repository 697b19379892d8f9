"""The command itself: the recipes on a random tiny SD3, one and two processes, and how it ends early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file

from config.grpo import RECIPES, get_config
from flow_grpo.evaluators.evaluation import evaluate, sample_evaluators
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.recipes import families, scenes
from flow_grpo.recipes.base import leaves
from flow_grpo.runs.history import read_history
from tests import forked
from tests.recipes.test_config import evaluations

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/train/train_sd3.py"
DRAWN = ("refl", "alignprop", "adjoint_matching", "fdfo", "nsr")  # how many evaluations they take depends on a draw


def shrink(config: ConfigDict, models: Path, logdir: Path) -> None:
    """Keep a recipe's method and sampler; take the random tiny models, few images and small batches."""
    config.logdir, config.run_name, config.trackers = str(logdir), "run", ()
    config.pretrained.model, config.resolution, config.max_sequence_length = str(models / "sd3"), 32, 8
    config.num_processes, config.diversity.num_prompts = 0, 0
    for file in ("train", "test", "eval_diversity"):
        config.prompts[file] = str(models / "prompts.txt")
    config.reward_model.pickscore = config.reward_model.clipscore = str(models / "clip")
    config.eval.judge = str(models / "judge")
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.num_steps = 2, 2, 4
    config.sample.groups_per_epoch = 2
    config.sample.num_image_per_prompt = min(2, config.sample.num_image_per_prompt)
    config.train.updates_per_epoch = min(2, config.train.updates_per_epoch)
    config.sample.num_steps = min(10, config.sample.num_steps)
    config.drtune.num_train_steps = min(5, config.drtune.num_train_steps)
    if config.train.method == "anchored":
        config.anchored.base_images, config.anchored.base_prompts = 6, 2
        config.anchored.target_kl = min(config.anchored.target_kl, 0.1)


# Those of scenes train in tests/recipes/test_scenes.py. Of other families, a recipe says its model's sizes; each family
# trains on a network of its own, by each of these methods, in tests/models/test_families.py.
OF_SD3 = [name for name, recipe in RECIPES.items() if recipe not in (*families.RECIPES, *scenes.RECIPES)]
SIZES = (
    "batch_size", "groups_per_epoch", "num_image_per_prompt", "num_steps", "num_train_steps", "updates_per_epoch",
    "learning_rate", "num_processes", "num_epochs", "freq", "resolution", "max_sequence_length", "recipe",
    "mixed_precision", "trackers",
)  # fmt: skip
SHRUNK = ("prompts.", "pretrained.", "diversity.", "lora.", "reward_model.", "eval.")


def course(name: str) -> tuple[object, ...]:
    """What a recipe's training takes of its settings, in kind: recipes that differ in sizes alone have the same."""
    kept = {k: v for k, v in leaves(get_config(name)) if not k.endswith(SIZES) and not k.startswith(SHRUNK)}
    return tuple((k, v if isinstance(v, str | bool | tuple) else (v == 0, v == 1)) for k, v in kept.items())


TRAINED = list({course(name): name for name in reversed(OF_SD3)}.values())[::-1]


def test_recipes_of_every_method_and_course_are_trained():
    assert {method_of(get_config(name)).name for name in TRAINED} == set(METHODS)
    of_families = {method_of(get_config(recipe.__name__)).name for recipe in families.RECIPES}
    assert of_families == {"grpo", "drtune", "anchored"}
    assert {course(name) for name in TRAINED} == {course(name) for name in OF_SD3}
    assert len(OF_SD3) - len(TRAINED) < 8  # few are left out: those for other numbers of processes


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_trains_and_evaluates_on_a_random_tiny_sd3(name, random_models, tmp_path, build):
    config = get_config(name)
    shrink(config, random_models, tmp_path)
    parts = build(config)
    for _ in range(2):  # LoRA's A moves from the second update on
        parts.policy.network_evaluations = 0
        metrics = parts.train()
    if not name.endswith(DRAWN):
        assert parts.policy.network_evaluations == sum(evaluations(config))
    assert metrics["skipped_updates"] == 0.0
    assert metrics["grad_norm"] > 0
    if method_of(config).name == "grpo":
        assert metrics["ratio_error"] < 1e-4
    evaluators = sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))
    results = evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, "eval").metrics
    assert {"eval/reward/total", "eval/judge/accuracy"} <= set(results)


# --- as a command --------------------------------------------------------------------------------------


def overrides(models: Path, logdir: Path) -> list[str]:
    """What turns the tiny recipes into a run of seconds."""
    values = {
        "logdir": logdir, "run_name": "run", "trackers": (), "num_epochs": 2, "eval_freq": 2, "save_freq": 1,
        "pretrained.model": models / "sd3", "prompts.train": models / "prompts.txt",
        "prompts.test": models / "prompts.txt", "prompts.eval_diversity": models / "prompts.txt",
        "diversity.model": models / "judge", "num_seeds": 4, "reward_model.pickscore": models / "clip",
        "reward_model.clipscore": models / "clip", "eval.judge": models / "judge", "eval.modes": models / "modes.json",
        "eval.num_image_per_prompt": 2, "eval.num_steps": 4, "sample.groups_per_epoch": 4,
        "sample.num_image_per_prompt": 2, "sample.batch_size": 4, "train.batch_size": 4, "train.updates_per_epoch": 1,
    }  # fmt: skip
    return [f"--config.{key}={value}" for key, value in values.items()]


# The script, given first, with learning rates that the settings would refuse.
UNCHECKED_RATE = """
import runpy, sys
from dataclasses import replace
from flow_grpo.recipes.base import KEYS
from flow_grpo.rules import POSITIVE
KEYS["train.learning_rate"] = replace(KEYS["train.learning_rate"], rule=POSITIVE)
sys.argv = sys.argv[1:]
sys.path[0] = "scripts/train"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(*command: str) -> subprocess.CompletedProcess[str]:
    """With an interpreter of its own, as a launcher needs it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def history(logdir: Path, run: str = "run") -> list[dict]:
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.startswith("perf/")}
        for line in read_history(logdir / run / "metrics.jsonl")
    ]


def test_one_and_two_processes_write_the_same_history(random_models, tmp_path):
    """GRPO, every evaluator and checkpoints, by the command, on one process and on two; metrics agree to rounding."""
    recipe = ["--config", "config/grpo.py:tiny_sd3", "--config.eval_ode_log_prob=True", "--config.visualize_steps=True"]
    recipe += ["--config.eval_ode_log_prob_freq=2", "--config.entropy.num_image_per_prompt=3"]
    one = forked.run(SCRIPT, *recipe, *overrides(random_models, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    recipe += ["--config.num_processes=2"]
    two = forked.run(SCRIPT, *recipe, *overrides(random_models, tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"train/ratio_error"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    assert "eval_ema/entropy/nats" in history(tmp_path / "two")[-1]
    assert (tmp_path / "two" / "run" / "images" / "eval_strip_000002.png").is_file()
    checkpoints = sorted(p.name for p in (tmp_path / "two" / "run" / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-000001", "checkpoint-000002"]


def test_accelerate_launch_runs_drtune_and_the_command_resumes_it(random_models, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", "scripts/accelerate_configs/cpu.yaml"]
    recipe = [SCRIPT, "--config", "config/grpo.py:tiny_sd3_use_gradient", *overrides(random_models, tmp_path)]
    first = python(*launch, *recipe)
    assert first.returncode == 0, first.stderr
    assert [line["step"] for line in history(tmp_path)] == [0, 1, 2, 2]
    again = forked.run(SCRIPT, f"--config.resume_from={tmp_path / 'run'}", "--config.num_epochs=3")
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in history(tmp_path)] == [0, 1, 2, 2, 3, 3]
    images = {p.name for p in (tmp_path / "run" / "images").iterdir()}
    assert {"eval_000000.png", "eval_ema_000000.png", "eval_000003.png"} <= images


def test_more_processes_asked_for_than_launched_is_refused_before_anything_loads(random_models, tmp_path):
    recipe = ["--config", "config/grpo.py:tiny_sd3", *overrides(random_models, tmp_path)]
    result = python(SCRIPT, *recipe, "--config.num_processes=2")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "num_processes" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_ends_with_one_sentence_and_keeps_its_checkpoint(random_models, tmp_path):
    """A first epoch goes well; then an absurd learning rate makes every weight, and so every velocity, non-finite."""
    arguments = [
        SCRIPT, "--config", "config/grpo.py:tiny_sd3_use_gradient", *overrides(random_models, tmp_path),
        "--config.eval_freq=0", "--config.train.max_nonfinite_updates=3",
    ]  # fmt: skip
    assert forked.run(*arguments, "--config.num_epochs=1").returncode == 0
    absurd = ["--config.train.learning_rate=1e12", "--config.num_epochs=30", f"--config.resume_from={tmp_path / 'run'}"]
    result = forked.run("-c", UNCHECKED_RATE, *arguments, *absurd)
    assert result.returncode == 1
    assert "3 updates in a row" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert history(tmp_path)[-1]["train/stopped"] == 1.0
    good = tmp_path / "run" / "checkpoints" / "checkpoint-000001"
    assert json.loads((good / "state.json").read_text())["counters"]["updates"] == 1
    weights = {k: v for k, v in load_file(good / "training_state.safetensors").items() if k.startswith("weights.")}
    assert all(w.isfinite().all() and w.abs().max() < 10 for w in weights.values())
    epochs = [line["step"] for line in history(tmp_path) if line.get("train/skipped_updates") == 0.0]
    saved = sorted(p.name for p in good.parent.iterdir())
    assert saved == [f"checkpoint-{epoch:06d}" for epoch in epochs]  # none once updates were skipped
