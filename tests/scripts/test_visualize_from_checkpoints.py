"""scripts/diversity_metrics/visualize_from_checkpoints.py: every number and picture is that of the weights trained."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from flow_grpo.diversity import measure as diversity
from flow_grpo.evaluators.diversity import (
    diversity_request,
    extractor_of,
    features_by_prompt,
    measure,
    run_bandwidth,
)
from flow_grpo.evaluators.entropy import entropy_metrics, prompt_log_densities
from flow_grpo.evaluators.evaluation import draw_samples, sample_evaluators, view
from flow_grpo.evaluators.evaluation import test_request as evaluated_request
from flow_grpo.evaluators.film_strip import GAP, HEADER, LEFT, film_strip
from flow_grpo.loops import drtune
from flow_grpo.policy import Policy
from flow_grpo.recipes.base import declare
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.config import read_config
from flow_grpo.runs.evaluations import records_of
from flow_grpo.runs.progress import Bars
from flow_grpo.runs.record import Record
from flow_grpo.runs.run import Run
from flow_grpo.training import checkpoint
from scripts.diversity_metrics.checkpoint_measures import FIGURES, std_standard_error
from scripts.diversity_metrics.visualize_from_checkpoints import main, place_reward
from tests import saved_runs

EPOCHS = (1, 2, 3)
NAMES = ["base", "checkpoint-000001", "checkpoint-000002", "checkpoint-000003"]


@pytest.fixture(scope="module")
def kept():
    """What the first test trained, and the first page that was made of it, for the others."""
    return {}


@pytest.fixture
def trained(config, build, kept):
    """A run of 3 DRTune epochs with a checkpoint of each, and direct measurements of the policy at each."""
    if "folder" in kept:
        return SimpleNamespace(**kept)
    config.use_reward_gradient, config.train.learning_rate, config.eval.guidance_scale = True, 2e-2, 3.0
    config.entropy.num_prompts, config.entropy.num_image_per_prompt, config.entropy.num_probes = 2, 3, 2
    config.entropy.num_strip_prompts, config.diversity.num_draws = 2, 50
    config.trackers = ("tensorboard",)
    parts = build(config)
    direct, pictures = [measured(parts)], [pictures_of(parts)]
    for epoch in EPOCHS:
        parts.train(drtune)
        parts.run.counters.network_evaluations, parts.run.counters.seconds = 100 * epoch, 1.5 * epoch
        parts.run.log({}, epoch)
        checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
        direct.append(measured(parts))
        pictures.append(pictures_of(parts))
    with parts.policy.ema_weights():
        averaged = measured(parts)
    parts.run.finish()
    kept |= {"folder": parts.run.folder, "direct": direct, "pictures": pictures, "averaged": averaged}
    kept["texts"] = evaluated_request(parts.prompts, parts.settings).prompts
    return SimpleNamespace(**kept)


def samples_of(parts, config):
    bars, requests = cast(Run, Bars()), [evaluated_request(parts.prompts, parts.settings), diversity_request(config)]
    return draw_samples(parts.policy, parts.prompts, parts.settings, bars, requests), requests


def pictures_of(parts) -> torch.Tensor:
    samples, requests = samples_of(parts, parts.settings.config)
    return view(samples, requests[0]).images


def measured(parts) -> dict:
    """Of the weights that the policy has now, without the command."""
    config, device = parts.settings.config, parts.accelerator.device
    samples, (tested, diverse) = samples_of(parts, config)
    found: dict = {}
    for evaluator in sample_evaluators(build_reward(config, device), parts.settings, device):
        found |= evaluator.evaluate(view(samples, tested)).metrics
    extractor = extractor_of(config, device)
    features = features_by_prompt(view(samples, diverse), extractor)
    bandwidth = run_bandwidth(config, parts.run.folder, extractor, features)
    found |= diversity.metrics(measure(features, bandwidth, extractor.name, config))
    found |= entropy_metrics(prompt_log_densities(parts.policy, tested.prompts[:2], cast(Run, Bars())))
    strip = film_strip(parts.policy, tested.prompts[:2])
    return found | {"divergence": strip.divergence.tolist(), "log_density": strip.log_density.tolist()}


@pytest.fixture
def shown(trained, kept, tmp_path_factory, monkeypatch):
    """The page of all checkpoints; how many base models were loaded for it."""
    if "out" not in kept:
        loaded, load = [], Policy.load.__func__

        def counted(cls, *arguments):
            loaded.append(arguments)
            return load(cls, *arguments)

        monkeypatch.setattr(Policy, "load", classmethod(counted))
        before, out = contents(trained.folder), tmp_path_factory.mktemp("page") / "new" / "folder"
        record = visualize(trained.folder / "checkpoints", out, "--visualize_all=True")
        kept |= {"out": out, "record": record, "loads": len(loaded), "before": before}
        kept["events"] = tensorboard_of(trained.folder)  # before other tests add to it
    return SimpleNamespace(**kept)


def tensorboard_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def visualize(folder: Path, out: Path, *arguments: str) -> dict:
    main(["--checkpoint_dir", str(folder), "--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("tensorboard"))
    return target


def spoil(run: Path, epoch: int) -> None:
    """Make a checkpoint's weights nan."""
    saved_runs.spoil(run / "checkpoints" / f"checkpoint-{epoch:06d}")


# --- numbers --------------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_policy_when_it_was_saved(trained, shown):
    models = shown.record["models"]
    assert [(model["name"], model["step"]) for model in models] == list(zip(NAMES, (0, *EPOCHS), strict=True))
    for model, direct in zip(models, trained.direct, strict=True):
        steps = {name: direct[name] for name in ("divergence", "log_density")}
        numbers = {name: value for name, value in direct.items() if name not in steps}
        assert model["metrics"] == pytest.approx(numbers, rel=1e-9)
        for name, values in steps.items():
            np.testing.assert_allclose(model[f"{name}_by_step"], values, rtol=1e-9)
        assert model["failures"] == {}


def test_models_differ_in_every_number(shown):
    models = shown.record["models"]
    for name in ("reward/total", "diversity/vendi", "diversity/rke", "entropy/nats", "ode_log_prob/std"):
        assert len({model["metrics"][name] for model in models}) == len(models), name


def test_intervals_hold_their_estimates(shown):
    names = {"reward/total", "reward/pickscore", "judge/accuracy", "diversity/vendi", "diversity/rke", "entropy/nats"}
    for model in shown.record["models"]:
        assert model["intervals"].keys() == names | {"ode_log_prob/std"}
        for name, (low, high) in model["intervals"].items():
            assert low < model["metrics"][name] < high, name


def test_the_change_of_the_entropy_is_that_of_pairs(shown):
    base, *others = shown.record["models"]
    assert base["entropy_change"] is None
    for model in others:
        pairs = np.array(base["log_prob"]) - np.array(model["log_prob"])
        assert model["entropy_change"]["nats"] == pytest.approx(pairs.mean(), rel=1e-9)
        assert model["entropy_change"]["low"] < pairs.mean() < model["entropy_change"]["high"]


def test_one_load_of_the_base_model_serves_all_and_the_run_is_left_as_it_was(trained, shown):
    assert shown.loads == 1
    after = contents(trained.folder)
    assert {name: after[name] for name in shown.before} == shown.before
    assert all(name.startswith("tensorboard") for name in after.keys() - shown.before.keys())


def test_the_same_command_gives_the_same_numbers_and_a_run_folder_will_do(trained, shown, tmp_path):
    visualize(trained.folder, tmp_path, "--visualize-all")
    assert (tmp_path / "results.json").read_bytes() == (shown.out / "results.json").read_bytes()


def test_without_their_weights_all_checkpoints_would_be_the_base(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.diversity_metrics.checkpoint_measures.load_weights", lambda *_: None)
    base, last = visualize(trained.folder, tmp_path, "--checkpoint_steps", "3")["models"]
    assert base["metrics"] == last["metrics"]


def test_averaged_weights_have_records_of_their_own_name(trained, tmp_path):
    base, last = visualize(trained.folder, tmp_path, "--checkpoint_steps", "3", "--ema")["models"]
    found = {name: trained.averaged[name] for name in last["metrics"]}
    assert last["metrics"] == pytest.approx(found, rel=1e-9)
    assert base["metrics"]["reward/total"] == pytest.approx(trained.direct[0]["reward/total"], rel=1e-9)
    assert [record.epoch for record in records_of(tmp_path, "eval_ema")] == [0, 3]


def test_fewer_prompts_and_seeds(trained, tmp_path):
    small = visualize(trained.folder, tmp_path, "--checkpoint_steps=1", "--num_prompts", "1", "--num-seeds=4")
    assert {name: len(texts) for name, texts in small["prompts"].items()} == dict.fromkeys(small["prompts"], 1)
    assert small["images_per_prompt"] == {"evaluated": 2, "diversity": 4, "density": 3, "strip": 1}
    assert len(small["models"][1]["divergence_by_step"]) == 1


def test_bandwidth_and_judge_are_the_run_s(trained, tmp_path):
    run = copied(trained.folder, tmp_path / "run")
    stored = run / "diversity" / "bandwidth.json"
    chosen = json.loads(stored.read_text())
    stored.write_text(json.dumps(chosen | {"bandwidth": 2 * chosen["bandwidth"]}))
    saved_runs.edit_config(run, **{"eval.judge": "", "eval.modes": ""})  # nor is there a judge that the run had not
    record = visualize(run, tmp_path / "out", "--checkpoint_steps", "1")
    assert not any(name.startswith("judge") for name in record["models"][0]["metrics"])
    assert record["bandwidth"] == 2 * chosen["bandwidth"]
    assert record["models"][0]["metrics"]["diversity/rke"] < trained.direct[0]["diversity/rke"]


def test_a_diverged_checkpoint_loses_only_its_own_numbers(trained, shown, tmp_path, capsys):
    run = copied(trained.folder, tmp_path / "run")
    spoil(run, 2)
    models = visualize(run, tmp_path / "out", "--checkpoint_steps", "1,2,3")["models"]
    for index in (0, 1, 3):
        assert models[index] == shown.record["models"][index]
    assert set(models[2]["metrics"].values()) == {None}
    assert models[2]["metrics"].keys() == models[1]["metrics"].keys()
    assert models[2]["failures"].keys() == {"samples", "log-densities", "film strip"}
    assert capsys.readouterr().out.count("checkpoint-000002: no ") == 3


def test_the_page_shows_a_diverged_checkpoint_without_numbers(trained, tmp_path):
    run = copied(trained.folder, tmp_path / "run")
    spoil(run, 2)
    visualize(run, tmp_path / "out", "--checkpoint_steps", "2")
    _, diverged = records_of(tmp_path / "out")
    assert (diverged.epoch, diverged.rewards, diverged.judge, diverged.diversity) == (2, {}, None, None)
    assert np.asarray(Image.open(diverged.sprite_path)).max() == 0
    assert not list((tmp_path / "out" / "images").glob("eval_strip_000002.png"))


# --- records --------------------------------------------------------------------------------------------


@pytest.fixture
def records(shown) -> list[Record]:
    """Of all models."""
    return records_of(shown.out)


def test_a_record_says_what_training_had_spent(records):
    spent = [(record.epoch, record.seconds, record.network_evaluations) for record in records]
    assert spent == [(0, 0.0, 0), (1, 1.5, 100), (2, 3.0, 200), (3, 4.5, 300)]


def test_a_record_holds_the_numbers_of_results_json(shown, records):
    for record, model in zip(records, shown.record["models"], strict=True):
        rewards = [value for value in record.rewards["total"] if value is not None]
        assert np.mean(rewards) == pytest.approx(model["metrics"]["reward/total"], rel=1e-5)
        assert np.mean(record.diversity.vendi) == pytest.approx(model["metrics"]["diversity/vendi"], rel=1e-5)
        for name in ("entropy/nats", "ode_log_prob/std", "modes/entropy"):
            assert record.extra[name] == pytest.approx(model["metrics"][name], rel=1e-5)


def test_a_record_is_compared_with_the_base(records):
    base, *others = records
    assert base.changes == {}
    for record in others:
        assert record.changes.keys() == {"reward", "vendi", "judge"}  # 4 images have no fifth neighbour
        assert record.diversity.to_base is not None
        assert record.changes["vendi"].old == pytest.approx(np.mean(base.diversity.vendi), rel=1e-5)


def test_the_images_of_a_record_are_the_policy_s(trained, records):
    for record, images in zip(records, trained.pictures, strict=True):
        sprite, places = np.asarray(Image.open(record.sprite_path)), record.images
        for number, key in enumerate((text, seed) for text in trained.texts for seed in (0, 1)):
            row, column = divmod(record.sprite.images.index(places[key]), record.sprite.columns)
            tile = sprite[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            assert np.array_equal(tile, (images[number].permute(1, 2, 0).numpy() * 255).round())
    assert not torch.equal(trained.pictures[0], trained.pictures[3])


# --- intervals ------------------------------------------------------------------------------------------


def test_the_error_of_the_spread_is_its_standard_deviation():
    """Over 2,000 repetitions of 4 prompts with 50 samples, to 5 %."""
    draws = np.random.default_rng(0).normal(size=(2000, 4, 50)) * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    spread = np.sqrt(draws.var(2, ddof=1).mean(1))
    errors = [std_standard_error(draw) for draw in draws[:400]]
    assert np.mean(errors) == pytest.approx(spread.std(), rel=0.05)
    assert math.isnan(std_standard_error(draws[0][:, :2]))


# --- pictures and page ----------------------------------------------------------------------------------


def test_the_last_frame_of_a_strip_is_close_to_the_final_image(trained, shown):
    """Its noise level is next to 0; the first two prompts, seed 0."""
    for number, images in enumerate(trained.pictures):
        strip = np.asarray(Image.open(shown.out / f"images/eval_strip_{number:06d}.png")).astype(float)
        for prompt in (0, 1):
            left, top = LEFT + 3 * (64 + GAP), HEADER + prompt * (64 + GAP)  # the last of 4 steps
            cell = strip[top : top + 64 : 2, left : left + 64 : 2]
            expected = images[2 * prompt].permute(1, 2, 0).numpy() * 255
            assert np.abs(cell - expected).mean() < 3
            other = images[2 * prompt + 1].permute(1, 2, 0).numpy() * 255  # the broken twin: another noise
            assert np.abs(cell - other).mean() > 10


def test_a_figure_that_cannot_be_drawn_loses_only_itself(trained, tmp_path, monkeypatch):
    def fail(history):
        raise RuntimeError("no font")

    monkeypatch.setitem(FIGURES, "curves", fail)
    with pytest.warns(UserWarning, match=r"curves_000003\.png could not be drawn \(no font\)"):
        visualize(trained.folder, tmp_path / "out", "--checkpoint_steps", "3")
    names = {path.name for path in (tmp_path / "out/images").iterdir()}
    assert names == {"eval_training_000003.png", "eval_strip_000000.png", "eval_strip_000003.png"}
    assert (tmp_path / "out/page.html").is_file()


def test_figures_and_strips_lie_where_a_run_has_them(shown):
    strips = {f"eval_strip_{epoch:06d}.png" for epoch in (0, *EPOCHS)}
    names = {path.name for path in (shown.out / "images").iterdir()}
    assert names == {"eval_curves_000003.png", "eval_training_000003.png"} | strips


def test_the_page_is_the_run_s_with_all_models_strips_and_the_command(trained, shown):
    page = (shown.out / "page.html").read_text()
    assert f"<title>{trained.folder.name}" in page
    assert all(name in page for name in ("base model", "epoch 1", "epoch 2", "epoch 3", "film strip of base model"))
    command = ["python", "scripts/diversity_metrics/visualize_from_checkpoints.py", "--checkpoint_dir"]
    assert shlex.join(command) in page


def test_nothing_of_other_checkpoints_is_left_on_the_page(trained, tmp_path):
    visualize(trained.folder, tmp_path, "--checkpoint_steps", "1,2")
    other = tmp_path / "images" / "mine.png"
    other.write_bytes(b"")
    visualize(trained.folder, tmp_path, "--checkpoint_steps", "1")
    assert [record.epoch for record in records_of(tmp_path)] == [0, 1]
    assert not (tmp_path / "images/eval_strip_000002.png").exists()
    assert other.exists()


def test_a_line_is_printed_of_each_model_and_of_the_page(trained, tmp_path, capsys):
    visualize(trained.folder, tmp_path, "--checkpoint_steps", "3")
    base, last, page = capsys.readouterr().out.splitlines()
    assert base.startswith("base model: reward ")
    assert last.startswith("epoch 3, ")
    assert page == f"page: {tmp_path / 'page.html'}"


def test_the_trackers_are_told(shown):
    for name in ("reward/total", "diversity/rke", "entropy/nats"):
        logged = {event.step: event.value for event in shown.events.Scalars(f"checkpoint/{name}")}
        expected = {model["step"]: model["metrics"][name] for model in shown.record["models"]}
        assert logged == pytest.approx(expected, rel=1e-5)
    tags = shown.events.Tags()["images"]
    assert {f"checkpoint/{name}" for name in ("curves", "training", "strip_base")} <= set(tags)


# --- the command line ------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    """Which takes seconds to import."""
    code = "import sys; from scripts.diversity_metrics import visualize_from_checkpoints as v; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_reward_of_the_runs_own_that_has_moved_is_taken_from_where_it_is_said_to_be(trained, tmp_path):
    config = read_config(trained.folder, {})
    declare(config, ["reward_files.mine"])
    config.reward_files.mine = "/gone/my.py:score"
    place_reward(f"mine={tmp_path}/my.py:score", config, trained.folder)
    assert config.reward_files.mine == f"{tmp_path}/my.py:score"


def test_a_reward_that_is_not_the_runs_own_is_one_sentence(refusal):
    for other in ("theirs=my.py:score", "pickscore"):
        assert "of its own it has none." in refusal("--checkpoint_steps=1", "--reward", other)


@pytest.fixture
def refusal(trained, capsys, monkeypatch):
    """The one sentence of a command that loads no model; the run's folder is given unless another is."""
    monkeypatch.setattr(Policy, "load", lambda *_: pytest.fail("a model was loaded"))

    def refused(*arguments: str, folder: Path = trained.folder) -> str:
        with pytest.raises(SystemExit) as exit_code:
            main(["--checkpoint_dir", str(folder), *arguments])
        assert exit_code.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return refused


def test_what_to_show_must_be_said_once(refusal):
    assert "Give either --visualize_all=True or --checkpoint_steps with some of 1, 2, 3." in refusal()
    assert "Give either" in refusal("--visualize_all=False")
    assert "Give either" in refusal("--visualize_all", "--checkpoint_steps", "1")
    assert "--visualize_all=perhaps is not allowed; it takes true or false" in refusal("--visualize_all=perhaps")


def test_folders_that_will_not_do_are_one_sentence(refusal, trained, tmp_path):
    assert "neither the checkpoints folder of a run nor a run" in refusal("--visualize_all", folder=tmp_path)
    assert "neither" in refusal("--visualize_all", folder=tmp_path / "none")
    one = trained.folder / "checkpoints" / "checkpoint-000001"
    assert "neither" in refusal("--visualize_all", folder=one)
    run = copied(trained.folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert "holds no checkpoint" in refusal("--visualize_all", folder=run / "checkpoints")
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        assert f"{file} is a file; it takes a folder" in refusal("--visualize_all", "--out", str(out))


@pytest.mark.parametrize("held", ["config.json", "evaluations"])
def test_a_folder_of_another_command_is_refused(refusal, trained, tmp_path, held):
    (tmp_path / held).mkdir()
    message = refusal("--visualize_all", "--out", str(tmp_path))
    assert f"--out {tmp_path} holds evaluations of another command; it takes a folder of its own." in message


def test_checkpoints_that_are_not_there_or_do_not_fit_are_one_sentence(refusal, trained, tmp_path):
    for steps in ("7", "1,,2", "best", "1,7"):
        assert "it has those of 1, 2, 3." in refusal("--checkpoint_steps", steps)
    run = copied(trained.folder, tmp_path / "run")
    second = run / "checkpoints" / "checkpoint-000002"
    weights = saved_runs.read_state(second)["weights"] | {"pretrained.model": "another"}
    saved_runs.edit_state(second, weights=weights)
    assert "was made with 'another'" in refusal("--visualize_all", folder=run)
    saved_runs.edit_config(run, **{"train.ema": False})
    assert "has no averaged weights" in refusal("--visualize_all", "--ema", folder=run)


def test_too_few_and_too_many_are_one_sentence(refusal):
    for seeds in ("3", "5"):
        assert f"--num_seeds {seeds} is not allowed; it takes 4 to 4" in refusal(
            "--visualize_all", "--num_seeds", seeds
        )
    for prompts in ("0", "5"):
        assert f"--num_prompts {prompts} is not allowed; it takes 1 to 4" in refusal(
            "--visualize_all", "--num_prompts", prompts
        )


def test_a_base_model_that_cannot_be_measured_is_one_sentence(trained, tmp_path, capsys, monkeypatch):
    drawn = draw_samples

    def broken(*arguments):
        samples = drawn(*arguments)
        samples.images[0, 0, 0, 0] = math.nan
        return samples

    monkeypatch.setattr("scripts.diversity_metrics.checkpoint_measures.draw_samples", broken)
    with pytest.raises(SystemExit) as exit_code:
        visualize(trained.folder, tmp_path, "--checkpoint_steps", "1")
    assert exit_code.value.code == 2
    assert "The base model's samples cannot be measured: its images are not finite" in capsys.readouterr().err
