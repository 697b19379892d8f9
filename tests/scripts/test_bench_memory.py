"""Bytes counted on tensors without data, against those of real ones; what a peak is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import memory, memory_models, memory_phases
from tests.models.families import build_sd3
from tests.velocities import PeakMemory

CPU = torch.device("cpu")
TOLERANCE = 1e-3  # of a phase; here they are the same to the byte, but a kernel may make a temporary of its own


def tiny_model() -> memory_models.Model:
    """SD3.5-medium with the sizes of the tests' SD3."""
    pipeline = build_sd3()
    transformer, vae = pipeline.transformer, pipeline.vae
    return replace(
        memory_models.MODELS[0],
        transformer=lambda: type(transformer).from_config(transformer.config),
        vae=lambda: type(vae).from_config(vae.config),
        prompt=(20, transformer.config.joint_attention_dim),
        pooled=transformer.config.pooled_projection_dim,
    )


def tiny_policy(model: memory_models.Model, tuning: str) -> Any:
    family = memory_models.build_family(model, CPU, torch.float32 if tuning == "full" else torch.bfloat16)
    return memory_phases.policy_of(family, memory_models.settings(model, 64, tuning), CPU)


def of_real_tensors(work) -> int:
    with PeakMemory() as memory_taken:
        work()
    return memory_taken.peak


class NothingFreed(memory_phases.LiveBytes):
    def _free(self, size: int) -> None:
        pass


def counted_without_frees(work) -> int:
    with NothingFreed() as bytes_:
        work()
    return bytes_.peak


def phases(meter, tuning: str) -> dict[str, int]:
    """Of tensors with data for PeakMemory, of such without for the others."""
    model = tiny_model()
    real = meter is of_real_tensors
    with memory_phases.cuda_autocast() if real else memory_phases.real_or_not(False):
        return memory_phases.of_training(tiny_policy(model, tuning), meter, plain=True)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bytes_without_data_are_those_of_real_tensors(tuning):
    real, counted = phases(of_real_tensors, tuning), phases(memory_phases.counted, tuning)
    assert counted == pytest.approx(real, rel=TOLERANCE)
    assert phases(counted_without_frees, tuning) != pytest.approx(real, rel=0.5)


def test_gradient_checkpointing_is_counted():
    found = phases(memory_phases.counted, "full")
    assert found["training"] < 0.8 * found["training_plain"]


def test_the_cpu_computes_layer_norm_as_cuda_does_only_inside():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    found = []
    for context in (memory_phases.cuda_autocast, torch.no_grad):
        with context(), torch.autocast("cpu", torch.bfloat16):
            found.append(torch.nn.functional.layer_norm(x, (4,)).dtype)
    assert found == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("model", memory_models.MODELS, ids=lambda model: model.name)
def test_a_typed_configuration_has_the_published_number_of_parameters(model):
    with torch.device("meta"):
        billions = memory_models.parameters(model.transformer()) / 1e9
    low, high = model.published
    assert low <= billions <= high


# --- peaks ------------------------------------------------------------------------------------------------

HELD = {
    "transformer": 800, "gathered": 10, "gradients": 80, "moments": 160, "average": 80, "vae_fp32": 4, "vae_bf16": 2,
    "text": 50, "reward": 7,
}  # fmt: skip
EXTRA = {
    "encoding": 1, "sampling": 2, "decoding_fp32": 8, "decoding_gradient_fp32": 30, "decoding_bf16": 4,
    "decoding_gradient_bf16": 15, "training": 20, "training_plain": 90, "updating": 16,
}  # fmt: skip
ROW = {"held": HELD, "extra": EXTRA}


def test_everything_resident_is_in_every_phase():
    always = 800 + 160 + 80 + 4 + 50 + 7
    assert memory.peaks(ROW, "grpo", memory.Options()) == {
        "encoding": always + 1, "sampling": always + 2, "scoring": always + 8,
        "training": always + 80 + 20, "updating": always + 80 + 16,
    }  # fmt: skip
    assert memory.peaks(ROW, "drtune", memory.Options())["scoring"] == always + 30
    assert memory.peaks(ROW, "grpo", memory.Options(), plain=True)["training"] == always + 80 + 90


def test_what_is_offloaded_is_there_in_its_own_phase_alone():
    always = 800 + 160 + 80 + 2
    found = memory.peaks(ROW, "drtune", memory.Options(offload_text=True, offload_rewards=True, vae="bf16"))
    assert found == {
        "encoding": always + 50 + 1, "sampling": always + 2, "scoring": always + 7 + 15,
        "training": always + 80 + 20, "updating": always + 80 + 16,
    }  # fmt: skip


def test_several_gpus_share_what_is_of_the_transformer_and_gather_two_blocks():
    always = (800 + 160 + 80) // 8 + 10 + 4 + 50 + 7
    found = memory.peaks(ROW, "grpo", memory.Options(gpus=8))
    assert found["training"] == always + 80 // 8 + 20
    assert found["updating"] == always + 80 // 8 + 16 // 8


@pytest.mark.parametrize(("gib", "expected"), [(21, "24 GB"), (22, "48 GB"), (126, "141 GB"), (127, "")])
def test_a_card_is_the_smallest_that_leaves_a_tenth(gib, expected):
    assert memory.card(gib * memory.GIB) == expected


def test_the_table_has_a_line_for_each_row_and_method():
    row = ROW | {"model": "SD3", "pixels": 512, "tuning": "lora", "parameters": 2e9}
    results = {"command": "c", "torch": "2", "device": "", "seconds": 1.0, "cpu_seconds": 1.0, "rows": [row]}
    text = memory.rendered("memory.md.j2", results)
    assert text.count("| SD3 | 2.00 B | LoRA |") == 2
    assert "Counted, not measured" in text


def test_the_pages_are_those_of_the_committed_results():
    root = Path(__file__).parents[2]
    folder = root / "assets/figures/memory"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert memory.rendered("memory.md.j2", results) == (folder / "table.md").read_text(encoding="utf-8")
    assert memory.rendered("hardware.md.j2", results) == (root / "docs/hardware.md").read_text(encoding="utf-8")


def test_bad_input_is_one_sentence(capsys):
    assert memory.main(["--models", "SD4"]) == 2
    assert "--models has no SD4; it takes SD3.5-medium" in capsys.readouterr().err
