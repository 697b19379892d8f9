"""scripts/diversity_metrics/eval_ode_log_prob.py: its numbers are those of the weights that were trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from flow_grpo.entropy import DivergenceEstimator, ode_log_density
from flow_grpo.evaluators.entropy import entropy_metrics, prompt_log_densities, sample_log_density
from flow_grpo.loops import drtune
from flow_grpo.randomness import keyed_generator
from flow_grpo.training import checkpoint
from flow_grpo.training.weights import load_weights
from scripts.diversity_metrics.eval_ode_log_prob import main
from scripts.diversity_metrics.given_images import ImageFile, pairing
from scripts.diversity_metrics.log_densities import data_log_densities, encode_images
from tests.saved_runs import edit_config, edit_state, read_state, spoil
from tests.wandb_file import OfflineRun

PROMPTS = ("a bag", "a boot")
IDS = [(p, s) for p in range(2) for s in range(2)]


@pytest.fixture(scope="module")
def kept():
    """What the first test trained, for the others."""
    return {}


@pytest.fixture
def trained(config, build, kept):
    """A run of 2 DRTune epochs, a checkpoint of each, and the log-densities of the policy before and after."""
    if kept:
        return kept
    config.use_reward_gradient, config.train.learning_rate, config.eval.guidance_scale = True, 2e-2, 3.0
    config.entropy.num_prompts, config.entropy.num_image_per_prompt, config.entropy.num_probes = 2, 3, 2
    config.trackers = ("tensorboard",)
    parts = build(config)

    def direct():
        return prompt_log_densities(parts.policy, PROMPTS, parts.run)

    densities = {"base": direct()}
    for epoch in (1, 2):
        parts.train(drtune)
        parts.run.log({}, epoch)
        checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
        densities[f"checkpoint-00000{epoch}"] = direct()
    with parts.policy.ema_weights():
        averaged = direct()
    latents = sample_log_density(parts.policy, PROMPTS, IDS).x_0
    with torch.no_grad():
        pictures = parts.policy.decode(latents)
    parts.run.finish()
    kept |= {"folder": parts.run.folder, "densities": densities, "averaged": averaged, "pictures": pictures}
    return kept


def evaluate(folder: Path, out: Path, *arguments: str) -> dict:
    main(["--run", str(folder), "--out", str(out), *arguments])
    return json.loads((out / "ode_log_prob.json").read_text(), parse_constant=pytest.fail)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- numbers --------------------------------------------------------------------------------------------


def test_base_and_checkpoints_have_the_numbers_of_the_policies_that_were_saved(trained, tmp_path, capsys):
    before = contents(trained["folder"])
    record = evaluate(trained["folder"], tmp_path)
    printed = capsys.readouterr().out
    assert all(model["name"] in printed for model in record["models"])
    assert [(model["name"], model["step"]) for model in record["models"]] == [
        (name, step) for step, name in enumerate(trained["densities"])
    ]
    for model, densities in zip(record["models"], trained["densities"].values(), strict=True):
        assert model["metrics"] == pytest.approx(entropy_metrics(densities), rel=1e-9)
        for row, prompt, estimate in zip(model["prompts"], PROMPTS, densities.per_prompt, strict=True):
            assert (row["prompt"], row["num_samples"]) == (prompt, 3)
            assert row["entropy"] == pytest.approx(estimate.entropy, rel=1e-9)
            assert row["quantiles"]["0.5"] == pytest.approx(estimate.quantiles[0.5], rel=1e-9)
            assert row["half_width_95"] == pytest.approx(4.302653 * estimate.standard_error, rel=1e-6)  # t, 2 degrees
        pooled = densities.pooled
        assert model["pooled"]["num_samples"] == 6
        assert model["pooled"]["log_prob_std_corrected"] == pytest.approx(pooled.log_prob_std_corrected, rel=1e-9)
        assert model["pooled"]["quantiles"]["0.95"] == pytest.approx(pooled.quantiles[0.95], rel=1e-9)
        assert "entropy" not in model["pooled"]
        metrics = model["metrics"]
        assert f"{metrics['entropy/nats']:.2f} ± {metrics['entropy/half_width_95']:.2f}" in printed
    assert record["models"][0]["metrics"] != record["models"][2]["metrics"]
    after = contents(trained["folder"])
    assert {name: after[name] for name in before} == before  # only tensorboard has grown, by a file
    assert all(name.startswith("tensorboard") for name in after.keys() - before.keys())
    logged = dict(scalars(trained["folder"], "checkpoint/entropy/nats"))
    assert logged == pytest.approx({m["step"]: m["metrics"]["entropy/nats"] for m in record["models"]}, rel=1e-6)
    assert Image.open(tmp_path / "ode_log_prob.png").size[0] > 500


def test_the_change_of_entropy_is_that_of_pairs_with_common_noise(trained, tmp_path):
    record = evaluate(trained["folder"], tmp_path, "--checkpoints", "2,base")
    before, after = (trained["densities"][name].log_prob for name in ("base", "checkpoint-000002"))
    change = record["models"][1]["entropy_change"]
    assert change["since"] == "base"
    assert change["nats"] == pytest.approx((before - after).mean().item(), rel=1e-9)
    entropies = [model["metrics"]["entropy/nats"] for model in record["models"]]
    assert change["nats"] == pytest.approx(entropies[1] - entropies[0], rel=1e-6)
    per_prompt = (before - after).std(1) / 3**0.5
    assert change["standard_error"] == pytest.approx(per_prompt.square().sum().sqrt().item() / 2, rel=1e-9)


def test_averaged_weights_are_those_of_the_average(trained, tmp_path):
    current = evaluate(trained["folder"], tmp_path / "a", "--checkpoints", "latest")["models"][0]["metrics"]
    averaged = evaluate(trained["folder"], tmp_path / "b", "--checkpoints", "latest", "--ema")["models"][0]["metrics"]
    assert averaged == pytest.approx(entropy_metrics(trained["averaged"]), rel=1e-9)
    assert abs(averaged["entropy/nats"] - current["entropy/nats"]) > 1e-3
    assert scalars(trained["folder"], "checkpoint_ema/entropy/nats")[0][0] == 2


def test_the_same_command_gives_the_same_file_and_one_probe_is_null(trained, tmp_path):
    arguments = ("--checkpoints", "base,1", "--num-probes", "1", "--num-prompts", "3", "--solver", "heun")
    first = evaluate(trained["folder"], tmp_path / "a", *arguments)
    evaluate(trained["folder"], tmp_path / "b", *arguments)
    texts = [(tmp_path / name / "ode_log_prob.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    assert len(first["models"][0]["prompts"]) == 3
    assert first["settings"]["entropy.solver"] == "heun"
    assert first["models"][0]["metrics"]["entropy/probe_part"] is None


def test_without_their_weights_all_checkpoints_would_be_the_base(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.diversity_metrics.log_densities.load_weights", lambda *_: None)
    record = evaluate(trained["folder"], tmp_path)
    assert record["models"][0]["metrics"] == record["models"][2]["metrics"]


def test_the_base_comes_back_after_a_checkpoint(trained, config, build):
    from flow_grpo.training.weights import Model

    config.run_name, config.use_reward_gradient = "other", True
    policy = build(config).policy
    base = [p.detach().clone() for p in policy.trainable]
    load_weights(policy, Model("c", 2, trained["folder"] / "checkpoints" / "checkpoint-000002"), base, False)
    assert not any(torch.equal(p, b) for p, b in zip(policy.trainable, base, strict=True))
    load_weights(policy, Model("base", 0, None), base, False)
    assert all(torch.equal(p, b) for p, b in zip(policy.trainable, base, strict=True))


# --- images ---------------------------------------------------------------------------------------------


def test_data_to_noise_agrees_with_the_sampling_direction(config, build):
    """On our own samples, Heun with 25 steps: within 5 standard errors of the two draws of probes, and 0.5 nats."""
    config.eval.guidance_scale, config.eval.num_steps = 3.0, 25
    config.entropy.solver, config.entropy.num_probes = "heun", 4
    policy = build(config).policy
    sampled = sample_log_density(policy, PROMPTS, IDS)
    prompts = [PROMPTS[p] for p, _ in IDS]

    def disagreement(latents):
        found = data_log_densities(policy, latents, prompts)
        log_prob = torch.tensor([row["log_prob"] for row in found], dtype=torch.float64)
        error = torch.tensor([row["probe_standard_error"] for row in found], dtype=torch.float64)
        allowed = 5 * (error.square() + sampled.probe_variance).sqrt() + 0.5
        return (log_prob - sampled.log_prob).abs() / allowed

    assert (disagreement(sampled.x_0) < 1).all()
    assert (disagreement(1.3 * sampled.x_0) > 1).any()  # the broken twin: latents at another scale


def test_latents_are_scaled_as_the_pipeline_scales_them(config, build):
    policy = build(config).policy
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = encode_images(policy, pixels)
    assert (latents.shape, latents.dtype) == (policy.noise([torch.Generator()] * 2).shape, torch.float32)
    moments = policy.vae.encode(pixels * 2 - 1).latent_dist.mode()
    back = latents / policy.vae.config.scaling_factor + policy.vae.config.shift_factor
    torch.testing.assert_close(back, moments, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents, moments, atol=1e-2)


def test_images_have_the_density_that_the_configuration_describes(config, build):
    """Three images in batches of two, with the evaluation's guidance, steps and solver, and probes of their own."""
    config.eval.guidance_scale, config.eval.num_steps, config.eval.seed = 3.0, 3, 5
    config.entropy.solver, config.entropy.num_probes, config.entropy.batch_size = "heun", 2, 2
    policy, prompts = build(config).policy, ("a bag", "a boot", "a bag")
    latents = policy.noise([keyed_generator(0, "latents", i) for i in range(3)])
    found = data_log_densities(policy, latents, prompts)
    assert len(found) == 3
    for i, row in enumerate(found):
        expected = ode_log_density(
            policy.velocity(policy.encode([prompts[i]]), 3.0),
            latents[i : i + 1],
            policy.sigmas(3).flip(0),
            DivergenceEstimator(num_probes=2),
            lambda evaluation, i=i: [keyed_generator(5, "image probe", i, evaluation)],
            solver="heun",
        )
        assert row["log_prob"] == pytest.approx(expected.log_prob.item(), abs=1e-2)
        assert row["probe_standard_error"] == pytest.approx(expected.probe_standard_error.item(), rel=1e-3)


@pytest.fixture
def images(trained, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(trained["pictures"][:3]):
        to_pil_image(picture).save(folder / f"{i}.png")
    return folder


def test_images_have_finite_densities_under_every_model(trained, images, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a bag\na bag\na boot\n")
    arguments = ("--images", str(images), "--prompts", str(tmp_path / "prompts.txt"))
    record = evaluate(trained["folder"], tmp_path / "out", *arguments)
    for model in record["models"]:
        assert [(row["file"], row["prompt"]) for row in model["images"]] == [
            ("0.png", "a bag"), ("1.png", "a bag"), ("2.png", "a boot"),
        ]  # fmt: skip
        for row in model["images"]:
            assert row["log_prob"] / record["dims"] == pytest.approx(row["nats_per_dim"], rel=1e-9)
            assert row["probe_standard_error"] > 0
    first, last = ([row["log_prob"] for row in record["models"][i]["images"]] for i in (0, 2))
    assert min(abs(a - b) for a, b in zip(first, last, strict=True)) > 1e-3
    assert "images: log p" in capsys.readouterr().out
    means = {m["step"]: sum(row["log_prob"] for row in m["images"]) / 3 for m in record["models"]}
    assert dict(scalars(trained["folder"], "checkpoint/images/log_prob")) == pytest.approx(means, rel=1e-6)


def test_wandb_is_told_every_checkpoint_on_an_axis_of_its_own(trained, tmp_path, monkeypatch):
    run = copied(trained["folder"], tmp_path / "run")
    edit_config(run, trackers=["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = evaluate(run, tmp_path / "out", "--checkpoints", "base,2")
    told = OfflineRun(run)
    assert told.metrics["checkpoint/*"].step_metric == "checkpoint/epoch"
    for row, model in zip(told.rows, record["models"], strict=True):
        expected = {f"checkpoint/{name}": value for name, value in model["metrics"].items()}
        assert {name: row[name] for name in row if not name.startswith("_")} == pytest.approx(
            expected | {"checkpoint/epoch": model["step"]}
        )


# --- the command line ------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    """Which takes seconds to import."""
    code = "import sys; from scripts.diversity_metrics import eval_ode_log_prob; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_code:
        main(list(arguments))
    assert exit_code.value.code == 2
    return capsys.readouterr().err


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("tensorboard"))
    return target


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    assert "config.json cannot be read" in refusal(capsys, "--run", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "it is not a configuration of this project" in refusal(capsys, "--run", str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert "has 'hidden_size'" in refusal(capsys, "--run", str(tmp_path))


def test_checkpoints_that_are_not_there_or_do_not_fit_are_one_sentence(trained, tmp_path, capsys):
    run = copied(trained["folder"], tmp_path / "run")
    for chosen in ("7", "best", "base,,1"):
        assert "(1, 2), with commas between" in refusal(capsys, "--run", str(run), "--checkpoints", chosen)
    first = run / "checkpoints" / "checkpoint-000001"
    edit_state(first, weights=read_state(first)["weights"] | {"use_lora": False})
    assert "config.use_lora of the run is True" in refusal(capsys, "--run", str(run))
    (run / "checkpoints" / "checkpoint-000002" / "training_state.safetensors").write_bytes(b"torn")
    assert "is damaged" in refusal(capsys, "--run", str(run), "--checkpoints", "2")
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in refusal(capsys, "--run", str(run))


def test_averaged_weights_of_a_run_without_them_are_one_sentence(trained, tmp_path, capsys):
    run = copied(trained["folder"], tmp_path / "run")
    edit_config(run, **{"train.ema": False})
    assert "has no averaged weights" in refusal(capsys, "--run", str(run), "--ema")


def test_a_velocity_that_is_not_finite_is_one_sentence_that_names_the_model(trained, tmp_path, capsys):
    run = copied(trained["folder"], tmp_path / "run")
    spoil(run / "checkpoints" / "checkpoint-000002")
    message = refusal(capsys, "--run", str(run), "--checkpoints", "2")
    assert "checkpoint-000002 has no log-density: step 0 of 4: the velocity is not finite at sigma = 1.0" in message


def test_a_folder_for_the_results_that_cannot_be_is_refused_before_anything_loads(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("flow_grpo.launch.launch", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        message = refusal(capsys, "--run", str(trained["folder"]), "--out", str(tmp_path / out))
        assert f"--out {tmp_path / out} cannot be a folder" in message


def test_images_pair_with_prompts_as_people_count_and_the_pairing_is_printed(trained, images, tmp_path, capsys):
    (images / "0.png").rename(images / "10.png")
    (tmp_path / "prompts.txt").write_text("a bag\na boot\na red coat\n")
    arguments = ("--images", str(images), "--prompts", str(tmp_path / "prompts.txt"), "--checkpoints", "base")
    record = evaluate(trained["folder"], tmp_path / "out", *arguments)
    pairs = [(row["file"], row["prompt"]) for row in record["models"][0]["images"]]
    assert pairs == [("1.png", "a bag"), ("2.png", "a boot"), ("10.png", "a red coat")]
    assert "1.png: a bag\n2.png: a boot\n10.png: a red coat\n" in capsys.readouterr().out


def test_the_printed_pairing_has_a_bound():
    lines = pairing([ImageFile(Path(f"{i}.png"), 300 * "x\n") for i in range(1000)]).splitlines()
    assert len(lines) == 21
    assert max(map(len, lines)) < 100
    assert lines[-1] == "and 980 more, in the order of the names"


def test_results_of_given_images_do_not_replace_the_runs(trained, images, tmp_path, capsys):
    run = copied(trained["folder"], tmp_path / "run")
    command = ["--run", str(run), "--checkpoints", "base"]
    main(command)
    before = (run / "ode_log_prob/ode_log_prob.json").read_bytes()
    main([*command, "--images", str(images), "--prompt", "a bag"])
    assert (run / "ode_log_prob/ode_log_prob.json").read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {run / 'ode_log_prob-2'}"


def test_a_figure_that_cannot_be_drawn_loses_no_number(trained, tmp_path, monkeypatch, capsys):
    def fail(record):
        raise RuntimeError("no font")

    monkeypatch.setattr("scripts.diversity_metrics.log_densities_report.figure", fail)
    with pytest.warns(UserWarning, match="could not be drawn"):
        record = evaluate(trained["folder"], tmp_path, "--checkpoints", "base")
    assert record["models"][0]["name"] == "base"


def test_images_that_cannot_be_used_are_one_sentence(trained, images, tmp_path, capsys):
    command = ("--run", str(trained["folder"]), "--checkpoints", "base", "--images", str(images))
    assert "either --prompt" in refusal(capsys, *command)
    (tmp_path / "two.txt").write_text("a bag\na boot\n")
    assert "has 2 prompts for 3 images" in refusal(capsys, *command, "--prompts", str(tmp_path / "two.txt"))
    Image.new("RGB", (48, 32)).save(images / "3.png")
    message = refusal(capsys, *command, "--prompt", "a bag")
    assert "3.png is 48 x 32 pixels; the run's are 32 x 32" in message
    (images / "3.png").write_bytes(b"no image")
    assert "3.png cannot be read as an image" in refusal(capsys, *command, "--prompt", "a bag")
    (images / "3.png").unlink()
    os.mkfifo(images / "3.png")
    assert "3.png is not a regular file" in refusal(capsys, *command, "--prompt", "a bag")
    (images / "3.png").unlink()
    (images / "more").mkdir()
    assert "holds a folder (more)" in refusal(capsys, *command, "--prompt", "a bag")


def test_values_out_of_range_are_one_sentence(trained, capsys):
    run = ("--run", str(trained["folder"]))
    assert "config.entropy.num_probes = 0 is not allowed" in refusal(capsys, *run, "--num-probes", "0")
    assert 'it takes "euler" or "heun" or "rk4"' in refusal(capsys, *run, "--solver", "dopri5")
    assert "--num-prompts 9 is more than the 4" in refusal(capsys, *run, "--num-prompts", "9")
    assert "give --images too" in refusal(capsys, *run, "--prompt", "a bag")
