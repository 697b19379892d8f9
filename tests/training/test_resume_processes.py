"""Every loop, with LoRA and without, goes on from 1 process to 2, to 3 and back to 1."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from flow_grpo.runs.evaluations import records_of
from tests import forked
from tests.conftest import PROMPTS
from tests.resume_worker import CASES, EVALUATED, SHARDED

WORKER = Path(__file__).parents[1] / "resume_worker.py"
EPOCHS = 4


def launch(processes: int, *arguments: str | Path | int) -> None:
    done = forked.run(WORKER, *map(str, arguments), processes=processes)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(random_models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    lines = [
        {"prompt": prompt, "weight": 1 + n, "category": "first" if n == 0 else "other"}
        for n, prompt in enumerate(PROMPTS)
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launch(1, random_models, out, "unbroken", 0, EPOCHS)
    for first, processes in enumerate((1, 2, 3, 1)):
        launch(processes, random_models, out, "broken", first, first + 1)
    return out


def last(runs: Path, name: str) -> Path:
    return runs / name / "checkpoints" / f"checkpoint-{EPOCHS:06d}"


BROKEN = [*(("broken", case) for case in CASES), *(("sharded", case) for case in SHARDED)]


@pytest.mark.parametrize(("kind", "case"), BROKEN)
def test_weights_average_and_moments_are_those_of_the_unbroken_run(runs, kind, case):
    """Sharded ones are on two and on three processes; before and after, one process holds them whole."""
    ours, theirs = (load_file(last(runs, f"{n}_{case}") / "training_state.safetensors") for n in (kind, "unbroken"))
    assert ours.keys() == theirs.keys()
    moved = max((theirs[name] - start).abs().max().item() for name, start in first_weights(runs, case).items())
    assert moved > 1e-4
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max().item() < 2e-6, name


def test_what_sharded_processes_export_is_the_model_itself(runs):
    """Written by three."""
    folder = runs / "sharded_grpo_full" / "checkpoints" / "checkpoint-000003"
    state = load_file(folder / "training_state.safetensors")
    for kind, name in (("weights", "transformer"), ("average", "transformer_ema")):
        assert json.loads((folder / name / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
        for weight, value in SD3Transformer2DModel.from_pretrained(folder / name).named_parameters():
            assert torch.equal(value, state[f"{kind}.{weight}"])


@pytest.mark.parametrize("file", ["adapter_model", "pytorch_lora_weights"])
def test_a_lora_that_sharded_processes_export_is_that_of_others(runs, file):
    ours, theirs = (
        load_file(runs / f"{kind}_grpo" / "checkpoints" / "checkpoint-000003" / "lora" / f"{file}.safetensors")
        for kind in ("sharded", "broken")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=4e-6)  # B is scaled by alpha / rank, 2


def first_weights(runs: Path, case: str):
    tensors = load_file(runs / f"unbroken_{case}" / "checkpoints" / "checkpoint-000001" / "training_state.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("weights.")}


@pytest.mark.parametrize(("kind", "case"), BROKEN)
def test_counters_are_exactly_those_of_the_unbroken_run(runs, kind, case):
    ours, theirs = (
        json.loads((last(runs, f"{name}_{case}") / "state.json").read_text())["counters"] for name in (kind, "unbroken")
    )
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert theirs["groups"] == 3 * EPOCHS


@pytest.mark.parametrize("kind", ["broken", "sharded"])
def test_the_records_of_its_evaluations_are_those_of_the_unbroken_run(runs, kind):
    """Weights agree to 2e-6, so images to an eighth bit here and there, and figures to a part in ten thousand."""
    ours, theirs = (records_of(runs / f"{name}_{EVALUATED}") for name in (kind, "unbroken"))
    assert [record.epoch for record in ours] == [record.epoch for record in theirs] == list(range(EPOCHS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.prompt, one.noise, one.diversity.noise) == (other.prompt, other.noise, other.diversity.noise)
        assert one.judge.guess == other.judge.guess
        totals = [np.array(record.rewards["total"], float) for record in (one, other)]  # nan: not rewarded
        np.testing.assert_allclose(*totals, rtol=1e-4)
        np.testing.assert_allclose(one.diversity.within, other.diversity.within, atol=1e-3)
        assert (
            set(one.changes) == set(other.changes) == ({"reward", "vendi", "reached", "judge"} if one.epoch else set())
        )
        pixels = [np.asarray(Image.open(record.sprite_path)).astype(int) for record in (one, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert ours[0].sprite_path.read_bytes() == theirs[0].sprite_path.read_bytes()
