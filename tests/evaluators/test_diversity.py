"""The diversity evaluator in training, and its command."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from flow_grpo.diversity import measure as diversity
from flow_grpo.diversity.rke import median_bandwidth
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.diversity import (
    build_diversity_evaluators,
    extractor_of,
    features_by_prompt,
    stored_bandwidth,
)
from flow_grpo.evaluators.evaluation import Measured, SampleRequest, draw_samples, evaluate, view
from flow_grpo.loops import drtune
from flow_grpo.runs.manifest import write_manifest
from flow_grpo.training import checkpoint
from scripts.diversity_metrics.diversity_evaluator import main
from tests.conftest import PROMPTS
from tests.saved_runs import edit_state, edit_tensors, read_state

CPU = torch.device("cpu")


@pytest.fixture
def parts(config, build):
    config.use_reward_gradient = config.eval_diversity = True
    config.eval_diversity_freq = 1
    config.train.learning_rate = 2e-2
    config.num_seeds, config.diversity.num_prompts, config.eval.batch_size = 5, 3, 4
    return build(config)


def evaluated(parts, evaluators, prefix="eval"):
    return evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, prefix).metrics


# --- the images -----------------------------------------------------------------------------------------


def test_images_are_drawn_once_for_all_evaluators_and_are_exactly_those_asked_for(parts):
    """2 images of each of 4 test prompts, 5 of each of 3 prompts, one of which is no test prompt."""
    request = SampleRequest((PROMPTS[1], PROMPTS[0], "a blue hat"), 5)
    tested = SampleRequest(PROMPTS, 2)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [tested, request])
    assert len(samples.prompts) == 5 + 5 + 2 + 2 + 5
    assert len(torch.unique(samples.latents.flatten(1), dim=0)) == 19
    seen = view(samples, request)
    assert seen.prompts == (PROMPTS[0],) * 5 + (PROMPTS[1],) * 5 + ("a blue hat",) * 5
    alone = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [tested])
    torch.testing.assert_close(view(samples, tested).images, alone.images, rtol=0, atol=1e-5)


def test_a_prompt_that_is_listed_twice_gives_no_image_twice(parts):
    request = SampleRequest((PROMPTS[0], PROMPTS[0]), 3)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [request])
    assert len(samples.prompts) == len(torch.unique(samples.latents.flatten(1), dim=0)) == 3


def test_each_evaluator_sees_its_own_images(parts):
    seen = {}

    class Spy:
        collective, freq = False, 1

        def __init__(self, name, request):
            self.name, self.request = name, request

        def evaluate(self, samples):
            seen[self.name] = samples
            return Measured()

    evaluated(parts, [Spy("test", None), Spy("diversity", SampleRequest(PROMPTS[:1], 5))], "eval_ema")
    assert seen["test"].prompts == tuple(p for p in PROMPTS for _ in range(2))
    assert seen["diversity"].prompts == PROMPTS[:1] * 5
    assert seen["diversity"].label == "eval_ema"


# --- in training ----------------------------------------------------------------------------------------


def test_what_is_logged_is_the_diversity_of_the_samples(parts):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    logged = evaluated(parts, [evaluator])
    request = SampleRequest(PROMPTS[:3], 5)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [request])
    features = features_by_prompt(samples, extractor_of(parts.settings.config, CPU))
    bandwidth = median_bandwidth(list(features.values()))
    direct = diversity.metrics(
        diversity.measure(features, bandwidth, 1.0, "", parts.settings.config.diversity.num_draws)
    )
    assert logged == pytest.approx({f"eval/{name}": value for name, value in direct.items()}, rel=1e-4)
    record = json.loads((parts.run.folder / "diversity/eval_000000.json").read_text())
    assert record["counts"] == dict.fromkeys(PROMPTS[:3], 5)
    assert record["bandwidth"] == pytest.approx(bandwidth, rel=1e-6)


def test_the_bandwidth_is_chosen_on_the_base_model_and_never_again(parts):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    evaluated(parts, [evaluator])
    chosen = evaluator.bandwidth
    for _ in range(3):
        parts.train(drtune)
    evaluated(parts, [evaluator])
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [evaluator.request])
    again = median_bandwidth(list(features_by_prompt(samples, evaluator.extractor).values()))
    assert evaluator.bandwidth == chosen != pytest.approx(again, rel=1e-3)
    stored = json.loads((parts.run.folder / "diversity/bandwidth.json").read_text())
    assert stored == {"bandwidth": chosen, "features": evaluator.extractor.name}


def resumed(config, build, run_folder: Path):
    config.resume_from, config.num_epochs = str(run_folder), 9
    parts = build(config)
    return build_diversity_evaluators(parts.settings, parts.run, CPU)


def test_a_resumed_run_keeps_its_bandwidth(parts, config, build):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    evaluated(parts, [evaluator])
    parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    (again,) = resumed(config, build, parts.run.folder)
    assert again.bandwidth == evaluator.bandwidth
    config.run_name = "elsewhere"
    (copied,) = resumed(config, build, parts.run.folder)
    assert copied.bandwidth == evaluator.bandwidth
    assert (Path(config.logdir) / "elsewhere/diversity/bandwidth.json").is_file()


def test_a_resumed_run_without_a_bandwidth_is_one_sentence_unless_one_is_given(parts, config, build):
    parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    with pytest.raises(ConfigError, match=r"config\.diversity\.bandwidth"):
        resumed(config, build, parts.run.folder)
    config.diversity.bandwidth = 0.7
    (evaluator,) = resumed(config, build, parts.run.folder)
    assert evaluator.bandwidth == 0.7


def test_a_configured_bandwidth_is_kept_with_the_run(config, build):
    config.eval_diversity, config.eval_diversity_freq, config.diversity.bandwidth = True, 1, 0.7
    parts = build(config)
    build_diversity_evaluators(parts.settings, parts.run, CPU)
    assert json.loads((parts.run.folder / "diversity/bandwidth.json").read_text())["bandwidth"] == 0.7


@pytest.mark.parametrize("bandwidth", ["0", "-1", "NaN", "[]", '"0.7"', "1" + 400 * "0"])
def test_a_damaged_bandwidth_is_refused_and_not_chosen_again(tmp_path, bandwidth):
    path = tmp_path / "bandwidth.json"
    path.write_text(f'{{"bandwidth": {bandwidth}, "features": "clip:x"}}')
    with pytest.raises(ConfigError, match="is damaged"):
        stored_bandwidth(tmp_path, "clip:x")
    assert bandwidth in path.read_text()


def test_a_bandwidth_of_other_features_is_refused(parts, config, build):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    evaluated(parts, [evaluator])
    parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    config.diversity.model = config.reward_model.pickscore
    with pytest.raises(ConfigError, match="bandwidth of other features"):
        resumed(config, build, parts.run.folder)


@pytest.mark.parametrize("value", [math.nan, 0.5])  # one colour: no two images differ
def test_samples_that_cannot_be_measured_do_not_end_the_run(parts, monkeypatch, value):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    good = parts.policy.decode
    monkeypatch.setattr(parts.policy, "decode", lambda latents: torch.full((len(latents), 3, 32, 32), value))
    with pytest.warns(UserWarning, match="no diversity at epoch 0" if math.isnan(value) else "RKE is not measured"):
        logged = evaluated(parts, [evaluator])
    assert set(logged) == {f"eval/{name}" for name in diversity.METRICS}
    assert math.isnan(logged["eval/diversity/rke"])
    assert logged["eval/diversity/vendi"] == pytest.approx(value * 2, nan_ok=True)
    monkeypatch.setattr(parts.policy, "decode", good)
    logged = evaluated(parts, [evaluator])
    assert logged["eval/diversity/vendi"] > 1
    assert math.isnan(logged["eval/diversity/rke"])  # a bandwidth of later weights would say nothing


def test_a_run_whose_base_model_gave_no_bandwidth_can_be_resumed(parts, config, build, monkeypatch):
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    monkeypatch.setattr(parts.policy, "decode", lambda latents: torch.full((len(latents), 3, 32, 32), 0.5))
    with pytest.warns(UserWarning, match="RKE is not measured"):
        evaluated(parts, [evaluator])
    assert json.loads((parts.run.folder / "diversity/bandwidth.json").read_text())["bandwidth"] is None
    monkeypatch.undo()
    parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    (again,) = resumed(config, build, parts.run.folder)
    assert math.isnan(again.bandwidth)


def test_without_it_nothing_is_built(parts, config, build):
    config.eval_diversity, config.run_name = False, "other"
    off = build(config)
    assert build_diversity_evaluators(off.settings, off.run, CPU) == []


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Two prompts of six noisy pictures."""
    generator = torch.Generator().manual_seed(0)
    for prompt, colour in (("a bag", 0), ("a boot", 2)):
        folder = tmp_path / "pictures" / prompt
        folder.mkdir(parents=True)
        for i in range(6):
            image = 0.5 * torch.rand(3, 32, 32, generator=generator)
            image[colour] += 0.5
            to_pil_image(image).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def command(models: Path, out: Path, *arguments: str) -> dict:
    main([*arguments, "--model", str(models / "judge"), "--out", str(out), "--draws", "100"])
    return json.loads((out / "diversity.json").read_text(), parse_constant=pytest.fail)


def test_a_folder_is_measured_prompt_by_prompt(random_models, pictures, tmp_path, capsys):
    record = command(random_models, tmp_path / "out", "--images", str(pictures))["pictures"]
    assert record["counts"] == {"a bag": 6, "a boot": 6}
    assert (tmp_path / "out/diversity.png").stat().st_size > 5000
    assert f"{record['within']['vendi']['estimate']:.2f} (" in capsys.readouterr().out
    again = command(random_models, tmp_path / "again", "--images", str(pictures))["pictures"]
    assert again == record


def test_a_folder_equals_its_own_reference(random_models, pictures, tmp_path, capsys):
    arguments = ("--images", str(pictures), "--reference", str(pictures))
    record = command(random_models, tmp_path / "out", *arguments)["pictures"]["reference"]
    assert (record["prdc"]["recall"], record["images"]) == (1.0, 12)
    assert record["relative_rke"] == pytest.approx(0, abs=1e-6)
    assert "against 12 reference images" in capsys.readouterr().out


def test_identical_images_have_a_vendi_score_and_no_rke(random_models, tmp_path, capsys):
    for i in range(5):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="RKE is not measured"):
        record = command(random_models, tmp_path / "out", "--images", str(tmp_path))[tmp_path.name]
    assert record["within"]["vendi"]["estimate"] == pytest.approx(1)
    assert record["bandwidth"] is record["within"]["rke"]["estimate"] is None
    assert "RKE is not measured" in capsys.readouterr().out


def test_results_of_folders_of_one_name_are_kept_apart(random_models, pictures, tmp_path, monkeypatch, capsys):
    other = Path(shutil.copytree(pictures, tmp_path / "other" / pictures.name))
    Image.new("RGB", (32, 32)).save(other / "a bag/0.png")
    monkeypatch.chdir(tmp_path)
    for folder in (pictures, other):
        main(["--images", str(folder), "--model", str(random_models / "judge"), "--draws", "100"])
    assert capsys.readouterr().out.splitlines()[-1] == "written to logs/diversity/pictures-2"
    first, second = (Path("logs/diversity", name, "diversity.json") for name in ("pictures", "pictures-2"))
    assert first.read_bytes() != second.read_bytes()


def test_numbers_are_written_before_a_figure_is_tried(random_models, pictures, tmp_path, monkeypatch, capsys):
    def fail(found):
        raise RuntimeError("no font")

    monkeypatch.setattr(diversity, "figure", fail)
    with pytest.warns(UserWarning, match="could not be drawn"):
        record = command(random_models, tmp_path / "out", "--images", str(pictures))
    assert record["pictures"]["counts"] == {"a bag": 6, "a boot": 6}
    out = capsys.readouterr().out
    assert "mean over prompts" in out
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"


@pytest.fixture
def trained(parts):
    """One epoch, with the base model measured and a checkpoint."""
    (evaluator,) = build_diversity_evaluators(parts.settings, parts.run, CPU)
    logged = {0: evaluated(parts, [evaluator])}
    for _ in range(3):
        parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    logged[3] = evaluated(parts, [evaluator])
    parts.run.finish()
    return parts.run.folder, logged


def test_a_checkpoint_has_the_figures_of_the_run_it_comes_from(trained, tmp_path, capsys):
    folder, logged = trained
    main(["--checkpoint", str(folder / "checkpoints/checkpoint-000003"), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/diversity.json").read_text())
    for name, epoch in (("base", 0), ("checkpoint-000003", 3)):
        for score in ("vendi", "rke"):
            expected = logged[epoch][f"eval/diversity/{score}"]
            assert record[name]["within"][score]["estimate"] == pytest.approx(expected, rel=1e-4)
    assert logged[0]["eval/diversity/rke"] != pytest.approx(logged[3]["eval/diversity/rke"], rel=1e-3)
    (folder / "diversity/bandwidth.json").unlink()  # a run that was trained without the evaluator
    main(["--checkpoint", str(folder)])
    latest = json.loads((folder / "diversity/checkpoint-000003/diversity.json").read_text())
    assert latest["base"]["bandwidth"] == pytest.approx(record["base"]["bandwidth"], rel=1e-5)
    assert (folder / "diversity/bandwidth.json").is_file()


def test_a_runs_bandwidth_serves_a_folder_of_images(trained, pictures, tmp_path, capsys):
    folder, _ = trained
    main(["--images", str(pictures), "--run", str(folder), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/diversity.json").read_text())["pictures"]
    assert record["bandwidth"] == json.loads((folder / "diversity/bandwidth.json").read_text())["bandwidth"]


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_code:
        main(list(arguments))
    assert exit_code.value.code == 2
    return capsys.readouterr().err


def test_folders_that_cannot_be_measured_are_one_sentence(random_models, pictures, tmp_path, capsys):
    options = ("--images", str(pictures), "--model", str(random_models / "judge"), "--out", str(tmp_path / "out"))
    (pictures / "a bag/0.png").write_bytes(b"no image")
    assert "0.png cannot be read as an image" in refusal(capsys, *options)
    main([*options, "--keep-readable"])
    assert "left out, unreadable: 1 in" in capsys.readouterr().out
    Image.new("RGB", (48, 32)).save(pictures / "a bag/0.png")
    assert "48 x 32" in refusal(capsys, *options)
    shutil.rmtree(pictures / "a boot")
    for i in range(1, 6):
        (pictures / f"a bag/{i}.png").unlink()
    assert "has 1 readable image; diversity needs at least 2" in refusal(capsys, *options)
    assert str(tmp_path / "nowhere") in refusal(capsys, "--images", str(tmp_path / "nowhere"))


def test_what_is_no_checkpoint_is_one_sentence(tmp_path, capsys):
    assert "holds no checkpoint" in refusal(capsys, "--checkpoint", str(tmp_path))


def test_a_lora_of_another_base_model_is_one_sentence(trained, capsys):
    folder, _ = trained
    checkpoint = folder / "checkpoints/checkpoint-000003"
    edit_state(checkpoint, weights=read_state(checkpoint)["weights"] | {"pretrained.model": "sdxl"})
    assert "'sdxl'" in refusal(capsys, "--checkpoint", str(folder))


def test_weights_of_other_shapes_are_one_sentence(trained, capsys):
    checkpoint = trained[0] / "checkpoints/checkpoint-000003"
    edit_tensors(checkpoint, lambda name, value: torch.zeros(2, 2))
    assert "has the shape (2, 2), where the model has" in refusal(capsys, "--checkpoint", str(trained[0]))
    save_file({}, checkpoint / "training_state.safetensors")
    write_manifest(checkpoint)
    assert "has no weights." in refusal(capsys, "--checkpoint", str(trained[0]))


def test_a_checkpoint_of_another_name_is_one_sentence(trained, capsys):
    (trained[0] / "checkpoints/checkpoint-000003").rename(trained[0] / "checkpoints/best")
    assert "is not named as a run names its own" in refusal(
        capsys, "--checkpoint", str(trained[0] / "checkpoints/best")
    )


def test_options_that_a_run_decides_are_refused(pictures, capsys):
    for arguments in (
        ("--checkpoint", "x", "--extractor", "dinov2"),
        ("--images", str(pictures), "--run", "x", "--model", "y"),
        ("--images", str(pictures), "--ema"),
        ("--images", str(pictures), "--bandwidth", "nan"),
    ):
        refusal(capsys, *arguments)


def test_a_reference_that_is_too_small_is_one_sentence_before_anything_is_sampled(trained, pictures, capsys):
    shutil.rmtree(pictures / "a boot")
    for i in (4, 5):
        (pictures / f"a bag/{i}.png").unlink()
    arguments = ("--checkpoint", str(trained[0]), "--reference", str(pictures))
    assert "has too few images; it takes over 5" in refusal(capsys, *arguments)


def test_a_file_is_no_output_folder(pictures, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert "is a file" in refusal(capsys, "--images", str(pictures), "--out", str(tmp_path / "out"))


def test_help_needs_no_torch():
    """Which takes seconds to import."""
    code = "import sys; from scripts.diversity_metrics import diversity_evaluator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_features_are_grouped_by_prompt_in_order(parts):
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    extractor = extractor_of(parts.settings.config, CPU)
    grouped = features_by_prompt(samples, extractor)
    assert list(grouped) == list(PROMPTS)
    np.testing.assert_allclose(np.concatenate(list(grouped.values())), extractor(samples.images), atol=1e-6)


def test_a_run_that_never_measures_has_no_evaluator_and_needs_no_bandwidth(config, build):
    config.eval_diversity, config.eval_freq, config.eval_diversity_freq = True, 0, 0
    parts = build(config)
    assert build_diversity_evaluators(parts.settings, parts.run, CPU) == []
