"""scripts/study/lora_scales.py scales the LoRA, and nothing else: 1 is the last evaluation of a run, 0 the first."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from flow_grpo.diffusers_patch.velocity import guided_velocity
from flow_grpo.evaluators.evaluation import Evaluation
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.loops import drtune
from flow_grpo.models.sd3 import SD3
from flow_grpo.recipes.base import leaves
from flow_grpo.runs.history import read_history
from flow_grpo.training.trainer import fit
from flow_grpo.types import PromptEmbeds
from scripts.study import plan
from scripts.study.claims.frontier import frontier
from scripts.study.lora_scales import TrainedModel, drtune_claims, main
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.study_records import Study
from tests.saved_runs import edit_config, spoil

NAMES = (REWARD, VENDI, RKE, ACCURACY)
TINY = {"num_epochs": 2, "num_seeds": 4, "eval_ode_log_prob": False, "train.learning_rate": 2e-2}
RUNS = [StudyRun("claims", "DRTune", "tiny_sd3_use_gradient", seed, 1000.0, 1, TINY) for seed in range(2)]
OTHERS = [
    StudyRun("claims", "GRPO", "tiny_sd3", 0, 1000.0, 1, TINY),
    StudyRun("search", "DRTune", "tiny_sd3_use_gradient", 0, 1000.0, 1, TINY),
]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What the first test trained, for the others."""
    return {}


@pytest.fixture
def logs(config, build, kept, monkeypatch) -> Path:
    """Folders of two DRTune runs of 2 epochs, the second a copy with another seed; they are the planned ones."""
    monkeypatch.setattr(plan, "whole", lambda: [*kept["planned"][::-1], *OTHERS])
    if kept:
        return kept["logs"]
    config.update_from_flattened_dict({**RUNS[0].settings, "recipe": RUNS[0].recipe, "use_reward_gradient": True})
    config.run_name = RUNS[0].name
    kept["planned"] = [replace(run, overrides=dict(leaves(config)) | {"seed": run.seed}) for run in RUNS]
    parts = build(config)
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    wired = (parts.prompts, parts.prompts, parts.reward, evaluators, parts.settings, parts.run)
    fit(parts.policy, drtune.train_epoch, *wired)
    shutil.copytree(parts.run.folder, Path(config.logdir) / RUNS[1].name)
    edit_config(Path(config.logdir) / RUNS[1].name, seed=1)
    kept["logs"] = Path(config.logdir)
    return kept["logs"]


@pytest.fixture
def model(logs, tmp_path) -> TrainedModel:
    return TrainedModel.load(logs / RUNS[0].name, tmp_path / "scratch")


def evaluations(logs: Path) -> list[dict[str, float]]:
    """Of the run, as its training logged them."""
    return [line for line in read_history(logs / RUNS[0].name / "metrics.jsonl") if f"eval/{REWARD}" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(logs: Path, out: Path, scales: str) -> list[dict]:
    main(["--logs", str(logs), "--out", str(out), "--scales", scales])
    return json.loads((out / "lora_scales.json").read_text(), parse_constant=pytest.fail)


# --- the scale ------------------------------------------------------------------------------------------


def test_scale_1_is_the_last_evaluation_of_the_training_and_0_the_base_model_s(logs, model):
    first, *_, last = evaluations(logs)
    for scale, expected in ((1.0, last), (0.0, first)):
        assert model.evaluate(scale) == pytest.approx({name: expected[f"eval/{name}"] for name in NAMES}, rel=1e-9)
    assert all(first[f"eval/{name}"] != last[f"eval/{name}"] for name in (REWARD, VENDI, RKE))


def test_between_them_every_figure_that_is_continuous_is_another(model):
    found = [model.evaluate(scale) for scale in (0.0, 0.4, 0.8, 1.0)]
    assert all(len({metrics[name] for metrics in found}) == 4 for name in (REWARD, VENDI, RKE))


def test_the_weights_are_as_they_were_afterwards_also_after_a_failure(model, monkeypatch):
    before = {name: value.clone() for name, value in model.policy.transformer.state_dict().items()}
    whole = model.evaluate(1.0)
    model.evaluate(0.3)
    assert model.evaluate(1.0) == whole
    monkeypatch.setattr("flow_grpo.evaluators.evaluation.evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.evaluate(0.3)
    monkeypatch.undo()
    assert model.evaluate(1.0) == whole
    after = model.policy.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Velocity:
    """The float64 velocity of a model at fixed points, as it is inside `evaluate`, and with LoRAs merged by hand."""

    def __init__(self, model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.transformer = model, model.policy.transformer.double()
        embeds = model.policy.encode(("a bag", "a boot"))
        self.embeds = PromptEmbeds(embeds.prompt_embeds.double(), embeds.pooled_prompt_embeds.double())
        shape = model.policy.noise([torch.Generator()] * 2).shape
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.seen = self.now()
        monkeypatch.setattr("flow_grpo.evaluators.evaluation.evaluate", self._evaluate)

    @torch.no_grad()
    def now(self) -> torch.Tensor:
        return guided_velocity(partial(SD3.velocity, self.transformer), self.latents, 0.6, self.embeds)

    def _evaluate(self, *_) -> Evaluation:
        self.seen = self.now()
        return Evaluation(dict.fromkeys((f"eval/{name}" for name in NAMES), 0.0))

    def evaluated(self, scale: float) -> torch.Tensor:
        self.model.evaluate(scale)
        return self.seen

    @torch.no_grad()
    def merged(self, scale: float) -> torch.Tensor:
        """With W_0 + scale (alpha / r) B A in the base layers' place, and no adapter."""
        lora = self.model.policy.settings.config.lora
        layers = [module for module in self.transformer.modules() if isinstance(module, LoraLayer)]
        base = [layer.base_layer.weight.clone() for layer in layers]
        for layer in layers:
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            layer.base_layer.weight += scale * lora.alpha / lora.rank * product
        self.transformer.disable_adapters()
        velocity = self.now()
        self.transformer.enable_adapters()
        for layer, weight in zip(layers, base, strict=True):
            layer.base_layer.weight.copy_(weight)
        return velocity


@pytest.mark.parametrize("scale", [0.0, 0.2, 0.7, 1.0])
def test_the_velocity_is_that_of_merged_weights(model, monkeypatch, scale):
    velocity = Velocity(model, monkeypatch)
    torch.testing.assert_close(velocity.evaluated(scale), velocity.merged(scale), rtol=1e-10, atol=1e-12)
    assert (velocity.merged(1.0) - velocity.merged(0.0)).abs().max() > 1e-2


def test_scaling_both_matrices_would_be_noticed(model, monkeypatch):
    @contextmanager
    def both(transformer, scale):
        matrices = [value for name, value in transformer.named_parameters() if ".lora_" in name]
        kept = [matrix.detach().clone() for matrix in matrices]
        with torch.no_grad():
            for matrix in matrices:
                matrix *= scale
            yield
            for matrix, value in zip(matrices, kept, strict=True):
                matrix.copy_(value)

    velocity = Velocity(model, monkeypatch)
    monkeypatch.setattr("peft.helpers.rescale_adapter_scale", both)
    seen = velocity.evaluated(0.5)
    torch.testing.assert_close(seen, velocity.merged(0.25), rtol=1e-10, atol=1e-12)
    assert (seen - velocity.merged(0.5)).abs().max() > 1e-3


# --- the file -------------------------------------------------------------------------------------------


def test_the_frontier_reads_an_entry_for_each_seed_and_scale_and_the_runs_are_left_alone(logs, model, tmp_path):
    before = contents(logs)
    found = written(logs, tmp_path / "new" / "out", "0.8, 0.5,0.5")
    assert contents(logs) == before
    assert [(entry["seed"], entry["scale"]) for entry in found] == [(0, 0.5), (0, 0.8), (1, 0.5), (1, 0.8)]
    assert len((tmp_path / "new" / "out" / "lora_scales.json").read_text().splitlines()) == len(found) + 2
    points = frontier(Study((), {}, ()), found)
    assert {point.label for point in points} == {"DRTune LoRA scaled by 0.5", "DRTune LoRA scaled by 0.8"}
    expected, seconds = model.evaluate(0.5), evaluations(logs)[-1]["seconds"]
    for point in (points[0], points[2]):  # the runs are copies
        assert point.method == "DRTune"
        assert point.seconds == pytest.approx(seconds, rel=5e-6)
        figures = dict(zip(NAMES, (point.reward, point.vendi, point.rke, point.accuracy), strict=True))
        assert figures == {name: float(f"{value:.6g}") for name, value in expected.items()}


def test_the_bandwidth_is_the_run_s_own(logs, tmp_path):
    shutil.copytree(logs, tmp_path / "logs")
    path = tmp_path / "logs" / RUNS[1].name / "diversity" / "bandwidth.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bandwidth": 0.3}))
    first, second = written(tmp_path / "logs", tmp_path / "out", "0.5")
    assert first[VENDI] == second[VENDI]
    assert first[RKE] != second[RKE]


def test_the_study_s_runs_are_the_drtune_claims():
    assert drtune_claims() == [run for run in plan.whole() if (run.group, run.label) == ("claims", "DRTune")]
    assert len(drtune_claims()) == len({run.seed for run in drtune_claims()}) >= 5


# --- refusals -------------------------------------------------------------------------------------------


@pytest.fixture
def refused(logs, tmp_path, capsys):
    """A function: arguments -> the sentence; a copy of the runs to damage, and an older file that must stay."""
    copy, out = tmp_path / "logs", tmp_path / "out"
    shutil.copytree(logs, copy)
    out.mkdir()
    (out / "lora_scales.json").write_text("[]\n")

    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_code:
            main(["--logs", str(copy), "--out", str(out), "--scales", "0.5", *arguments])
        assert exit_code.value.code == 2
        assert contents(out) == {"lora_scales.json": b"[]\n"}
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return SimpleNamespace(by=refusal, run=copy / RUNS[1].name, logs=copy)


def test_scales_out_of_range_are_one_sentence_before_anything_is_read(refused, monkeypatch):
    monkeypatch.setattr(plan, "whole", lambda: pytest.fail("the runs were read"))
    for scales, wrong in (("0.5,half", "'half' is not a number"), ("", "'' is not a number")):
        assert wrong in refused.by("--scales", scales)
    for wrong in ("0", "1", "-0.5", "1.5", "nan", "inf"):
        assert f"{wrong} is not between 0 (base model) and 1" in refused.by(f"--scales={wrong}")
    assert "is a file; it takes a folder" in refused.by("--out", str(refused.run / "config.json"))


def test_no_finished_run_is_one_sentence(refused, tmp_path):
    message = refused.by("--logs", str(tmp_path / "nowhere"))
    assert f"--logs {tmp_path / 'nowhere'} holds no finished DRTune run of the claims" in message
    for run in RUNS:
        edit_config(refused.logs / run.name, seed=7)  # trained with other settings
    assert "holds no finished DRTune run" in refused.by()


def test_a_run_that_cannot_be_read_is_one_sentence(refused, kept, monkeypatch):
    (refused.run / "diversity" / "bandwidth.json").rename(refused.run / "kept.json")
    assert f"{refused.run / 'diversity/bandwidth.json'} is missing" in refused.by()
    (refused.run / "kept.json").rename(refused.run / "diversity" / "bandwidth.json")
    edit_config(refused.run, use_lora=False)
    without = replace(kept["planned"][1], overrides={**kept["planned"][1].overrides, "use_lora": False})
    with monkeypatch.context() as patch:
        patch.setattr(plan, "whole", lambda: [without])
        assert f"{refused.run} has no LoRA to scale" in refused.by()
    edit_config(refused.run, use_lora=True)
    weights = next(refused.run.glob("checkpoints/*/training_state.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(b"torn")
    assert f"(the newest, {weights.parent}: training_state.safetensors has 4 bytes" in refused.by()
    weights.write_bytes(whole)
    spoil(weights.parent)
    assert f"{RUNS[1].name}, LoRA scaled by 0.5: reward/total, diversity/vendi, diversity/rke, judge/" in refused.by()
