"""scripts/bench/speed.py: what it counts, what it compares with, and the table that it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flow_grpo.recipes.registry import get_config
from flow_grpo.settings import resolve
from scripts.bench import memory_models, speed_gpu
from scripts.bench.speed import RESULTS, _certain, spread, summary, table
from scripts.bench.speed_cases import ALL, GRPO, Case
from scripts.bench.speed_worker import worker_of
from tests.models.families import build_sd3

SMALL = {
    "sample.num_steps": 2, "sample.groups_per_epoch": 2, "sample.num_image_per_prompt": 2, "sample.batch_size": 4,
    "train.batch_size": 2,
}  # fmt: skip
ROUND = {"seconds": 2.0, "network": 1.5, "scoring": 0.1, "compiled": 1.0, "upstream": 3.0}
TOLD = {"images": 80, "evaluations": 1600, "trained": 800, "first": 0.5}


@pytest.mark.parametrize("name", ALL)
def test_every_case_is_a_configuration_that_resolves(name, tmp_path):
    case = ALL[name]
    config = get_config(case.recipe)
    config.update_from_flattened_dict({"num_processes": 0, **case.changes})
    config.logdir = str(tmp_path)
    resolve(config, case.processes, cuda=False)


@pytest.fixture(scope="module")
def small():
    """A worker of a small epoch, with upstream's loop, and how many latents each part evaluates."""
    with worker_of(Case(GRPO, {**SMALL, "sample.guidance_scale": 2.0}, upstream=True)) as worker:
        sizes: list[int] = []
        worker.policy.transformer.register_forward_hook(
            lambda module, args, kwargs, out: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        seen = {}
        for name, work in worker.parts.items():
            sizes.clear()
            work()
            seen[name] = list(sizes)
        yield worker, seen


def test_an_epoch_is_timed_with_the_calls_that_it_makes(small):
    worker, seen = small
    assert (worker.images, worker.evaluations, worker.trained) == (4, 2 * 2 * (4 + 4), 2 * 2 * 4)
    assert sorted(seen["network"]) == sorted(seen["seconds"])


def test_upstreams_order_of_calls_evaluates_the_network_as_often(small):
    worker, seen = small
    assert sum(seen["upstream"]) == worker.evaluations


def test_a_round_times_every_part(small):
    found = small[0].round()
    assert set(found) == {"seconds", "network", "scoring", "upstream"}
    assert min(found.values()) > 0


def test_upstreams_loop_trains_the_weights(small):
    worker, _ = small
    before = [parameter.detach().clone() for parameter in worker.policy.trainable]
    worker.parts["upstream"]()
    after = worker.policy.trainable
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_ratios_are_of_the_same_round():
    """A machine that is twice as slow in one round changes no ratio."""
    slow = {name: 2 * value for name, value in ROUND.items()}
    ratios = summary(TOLD, [ROUND, slow, ROUND], [3.0, 6.0, 3.0])["ratios"]
    assert ratios["network"] == [2.0 / 1.5] * 3
    assert ratios["calls"] == [pytest.approx(2.0 / 1.6)] * 3
    assert ratios["best"] == [pytest.approx(2.0 / 1.1)] * 3
    assert ratios["upstream"] == ratios["before"] == [1.5] * 3  # images a second over theirs


def test_an_interval_is_the_range_of_the_rounds():
    assert spread([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]) == [2.0, 1.0, 3.0]
    assert [_certain(rounds) for rounds in (3, 5, 7)] == ["75 %", "94 %", "98 %"]


@pytest.mark.parametrize("against", ["", "abc123"])
def test_the_tables_have_a_row_of_every_case(against):
    rows = [
        {"case": "GRPO", **summary(TOLD, [ROUND], [3.0] if against else [])},
        {"case": "new", **summary(TOLD, [{"seconds": 2.0, "network": 2.0}])},
    ]
    results = {
        "command": "x", "machine": "y", "rounds": 3, "load": 1.0, "load_after": 2.0, "against": against, "rows": rows,
    }  # fmt: skip
    lines = [line for line in table(results).splitlines() if line.startswith("|")]
    assert lines[2] == "| GRPO | 80 | 1600 | 800 | 2.00 | 40.0 | 0.5 |"
    assert lines[6].startswith("| GRPO | 1.33 (1.33 to 1.33) | 1.25 (1.25 to 1.25) | 1.82 ")
    assert lines[6].endswith("| 1.50 (1.50 to 1.50) | 1.50 (1.50 to 1.50) |") == bool(against)
    assert lines[7].startswith("| new | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | - | - |")
    assert len({line.count("|") for line in lines[4:]}) == 1


# --- the committed table --------------------------------------------------------------------------------


def committed():
    return json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))


def test_the_committed_table_is_of_the_committed_results():
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == table(committed())


def test_the_committed_results_have_every_case_unhurried():
    results = committed()
    assert [row["case"] for row in results["rows"]] == list(ALL)
    assert "--quick" not in results["command"]
    assert results["against"]


def test_the_figures_of_the_page_are_those_of_the_results():
    page = (Path(__file__).parents[2] / "docs/speed.md").read_text(encoding="utf-8")
    rows = {row["case"]: row for row in committed()["rows"]}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    shown = {cells[0]: cells[1:] for cells in lines if cells[0] in rows}
    assert len(shown) >= 5
    for case, cells in shown.items():
        ratios = rows[case]["ratios"]
        others = [f"{ratios[name][0]:.2f}" if name in ratios else "-" for name in ("calls", "best", "upstream")]
        assert cells == [f"{rows[case]['images_per_second']:.1f}", *others], case
    grpo = rows["GRPO"]
    bound = grpo["upstream"] / (grpo["compiled"] + grpo["scoring"])
    assert f"decoder and reward, it would be {bound:.1f} times" in page


# --- SD3.5-medium on a GPU ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def epoch():
    """That of the GPU, with the sizes of the tests' SD3, on the CPU."""
    pipeline = build_sd3()
    transformer, vae = pipeline.transformer, pipeline.vae
    model = replace(
        memory_models.MODELS[0],
        transformer=lambda: type(transformer).from_config(transformer.config),
        vae=lambda: type(vae).from_config(vae.config),
        prompt=(20, transformer.config.joint_attention_dim),
        pooled=transformer.config.pooled_projection_dim,
    )
    policy = speed_gpu.sd35_medium(model, torch.device("cpu"), 64)
    return speed_gpu.Epoch(policy, lambda images, prompts, metadata: images.mean((1, 2, 3)), images=4, batch=2)


def test_what_is_timed_on_a_gpu_makes_the_calls_of_an_epoch(epoch):
    policy, sample = epoch.policy, epoch.policy.settings.config.sample
    trained_of = {"GRPO, 4": 4, "GRPO, all": sample.num_steps, "DRTune": policy.settings.config.drtune.num_train_steps}
    for name, work in speed_gpu.epochs(epoch).items():
        before = [parameter.detach().clone() for parameter in policy.trainable]
        policy.network_evaluations = policy.trained_evaluations = 0
        work()
        trained = next(steps for start, steps in trained_of.items() if name.startswith(start))
        latents = 2 * epoch.images  # guided
        assert policy.trained_evaluations == latents * trained
        assert policy.network_evaluations == latents * (sample.num_steps + trained)
        changed = zip(before, policy.trainable, strict=True)
        assert any(not torch.equal(one, other) for one, other in changed), name


def test_a_row_of_the_gpu_table_says_how_many_images_a_second(epoch):
    row = speed_gpu.timed("nothing", lambda: None, epoch, rounds=1)
    assert row["images_per_second"] == 4 / row["seconds"]
    assert (row["peak_gib"], row["mfu"]) == (None, None)
