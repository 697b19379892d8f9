"""Metrics of an epoch's cost: seconds that add up, images, memory, FLOPs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from flow_grpo.runs.history import read_history
from flow_grpo.runs.phases import Phases
from flow_grpo.training import performance as module
from flow_grpo.training.performance import flops_per_evaluation, peak_flops, performance
from tests.training.saving import train


def test_every_epoch_says_where_its_seconds_went(config, build):
    config.num_epochs = 2
    run = train(config, build).run
    lines = [line for line in read_history(run.folder / "metrics.jsonl") if "perf/images_per_second" in line]
    assert [line["step"] for line in lines] == [1, 2]
    before = 0.0
    for line in lines:
        spent, before = line["seconds"] - before, line["seconds"]
        parts = [line[f"perf/seconds_{name}"] for name in ("sampling", "scoring", "training")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(spent)
        assert line["perf/images_per_second"] == pytest.approx(8 / spent)
        assert 0.05 < line["perf/peak_memory_gib"] < 64


def test_phases_add_up_and_begin_anew(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with phases(name):
            pass
    assert phases.seconds == {"a": 6.0, "b": 2.0}
    phases.begin()
    assert phases.seconds == {}


@pytest.mark.parametrize(("use_lora", "backward"), [(True, 1), (False, 2)])
def test_a_backward_pass_counts_once_for_activations_and_once_for_weights_that_are_trained(
    config, build, monkeypatch, use_lora, backward
):
    config.use_lora = use_lora
    policy = build(config).policy
    monkeypatch.setattr(module, "peak_flops", lambda device, precision: 1e12)
    policy.network_evaluations, policy.trained_evaluations = 100, 40
    found = performance(policy, Phases(policy.device), images=8, seconds=2.0)
    assert found["perf/mfu"] == pytest.approx((100 + backward * 40) * flops_per_evaluation(policy) / 2.0 / 1e12)


def products_by_hand(config, tokens: int, words: int) -> int:
    """Multiplications of one forward of a tiny SD3, without LoRA, whose first block has an attention of its own."""
    width, patch, blocks = 32, config.in_channels * config.patch_size**2, config.num_layers
    image = patch * width + width * patch  # embedded, and put out
    prompt = config.joint_attention_dim * width
    vectors = 256 * width + config.pooled_projection_dim * width + 2 * width**2 + width * 2 * width  # time, pooled, out
    attention = 0
    for block in range(blocks):
        last, dual = block == blocks - 1, block == 0
        image += (4 + 8) * width**2 + (4 * width**2 if dual else 0)  # query, key, value, out; a feed-forward of 4
        prompt += 3 * width**2 if last else (4 + 8) * width**2
        vectors += ((9 if dual else 6) + (2 if last else 6)) * width**2  # shifts, scales and gates
        attention += 2 * (tokens + words) ** 2 * width + (2 * tokens**2 * width if dual else 0)
    return tokens * image + words * prompt + vectors + attention


@pytest.mark.parametrize("rank", [0, 4])
def test_the_flops_of_a_forward_are_twice_its_multiplications_counted_by_hand(config, build, rank):
    """32 x 32 pixels are 16 tokens; the CLIPs and the T5 have 8 words each. A LoRA adds two products to a layer."""
    config.use_lora, config.lora.rank, config.lora.target_modules = rank > 0, rank or 4, ("attn.to_q", "ff.net.2")
    policy = build(config).policy
    lora = 2 * 16 * rank * ((32 + 32) + (128 + 32))
    assert flops_per_evaluation(policy) == 2 * (products_by_hand(policy.transformer.config, tokens=16, words=16) + lora)
    assert policy.network_evaluations == 0


def test_what_is_counted_of_a_policy_does_not_keep_it_in_memory(config, build):
    parts = build(config)
    assert flops_per_evaluation(parts.policy) == flops_per_evaluation(parts.policy)
    gone = weakref.ref(parts.policy)
    del parts.policy
    gc.collect()
    assert gone() is None


def test_graphs_are_counted_where_there_is_one(config, build):
    policy = build(config).policy
    embeds, x = policy.encode(["a bag"]), torch.zeros(1, *policy.latent_shape)
    policy.velocity(embeds, 3.0)(x, 0.5)
    with torch.no_grad():
        policy.velocity(embeds, 3.0)(x, 0.5)
    assert (policy.network_evaluations, policy.trained_evaluations) == (4, 2)
    policy.velocity(embeds, 3.0, detach_unconditional=True)(x, 0.5)
    assert (policy.network_evaluations, policy.trained_evaluations) == (6, 3)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [("NVIDIA H100 80GB HBM3", "bf16", 9.89e14), ("NVIDIA H100 PCIe", "bf16", 7.56e14), ("Some GPU", "bf16", 0.0),
     ("NVIDIA H100 80GB HBM3", "no", 0.0)],
)  # fmt: skip
def test_the_peak_is_known_by_the_devices_name_or_not_at_all(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == expected
