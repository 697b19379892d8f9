"""Compiled blocks: the same network, for the batches of training alone."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flow_grpo.compilation import Compiled, batch_sizes, is_compiled
from flow_grpo.errors import ConfigError
from flow_grpo.parallel import blocks_of
from flow_grpo.randomness import keyed_generator
from flow_grpo.settings import resolve

BATCH = 3


def noise(policy, batch=BATCH):
    return policy.noise([keyed_generator(0, "test", i) for i in range(batch)])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def policy(config, build):
    """With a LoRA that does something."""
    made = build(config).policy
    with torch.no_grad():
        for i, parameter in enumerate(made.trainable):
            parameter += 0.05 * torch.randn(parameter.shape, generator=keyed_generator(0, "weights", i))
    return made


def counted(policy, sizes=(BATCH,)):
    """The policy's blocks compiled by a backend that counts graphs and runs them as they are."""
    counter = CompileCounterWithBackend("aot_eager")
    policy._compiled = Compiled([policy.transformer], sizes, backend=counter)
    return counter


def velocity_and_gradient(policy, batch=BATCH, guidance_scale=1.0):
    embeds = policy.encode(["a bag", "a boot", "a coat", "a hat"][:batch])
    found = policy.velocity(embeds, guidance_scale)(noise(policy, batch), 0.6)
    gradient = torch.autograd.grad(found.square().sum(), policy.trainable)
    return found.detach(), torch.cat([part.flatten() for part in gradient])


def largest_error(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_a_compiled_block_gives_the_eager_velocity_and_gradient_and_one_velocity_to_sampling_and_training(
    policy, monkeypatch
):
    eager = velocity_and_gradient(policy)
    first = blocks_of(policy.transformer)[:1]  # seconds of compiling each
    monkeypatch.setattr("flow_grpo.compilation.blocks_of", lambda transformer: first)
    policy._compiled = Compiled([policy.transformer], [BATCH])
    compiled = velocity_and_gradient(policy)
    for one, other in zip(compiled, eager, strict=True):
        assert largest_error(one, other) < 1e-5
    with torch.no_grad():
        sampled = policy.velocity(policy.encode(["a bag", "a boot", "a coat"]), 1.0)(noise(policy), 0.6)
    assert torch.equal(sampled, compiled[0])  # the ratio is 1
    with torch.no_grad():  # a broken twin: other weights are seen
        policy.trainable[0].mul_(1.5)
    assert largest_error(velocity_and_gradient(policy)[0], eager[0]) > 1e-4


def test_gradient_checkpointing_runs_compiled_blocks_again(policy):
    eager = velocity_and_gradient(policy)
    policy.transformer.enable_gradient_checkpointing()
    counter = counted(policy)
    for one, other in zip(velocity_and_gradient(policy), eager, strict=True):
        assert largest_error(one, other) < 1e-6
    assert counter.frame_count > 0


def test_changed_weights_compile_nothing_anew(policy):
    counter = counted(policy)
    velocity_and_gradient(policy)
    before = counter.frame_count
    assert before > 0
    policy.keep_old()
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.mul_(1.1)
    velocity_and_gradient(policy)
    with policy.ema_weights():
        velocity_and_gradient(policy)
    assert counter.frame_count == before


def test_another_batch_runs_eagerly_and_compiles_nothing(policy):
    counter = counted(policy)
    velocity_and_gradient(policy, batch=2)
    velocity_and_gradient(policy, batch=4)
    assert counter.frame_count == 0


def test_inside_eager_nothing_is_compiled(policy):
    counter = counted(policy)
    with policy.eager():
        velocity_and_gradient(policy)
    assert counter.frame_count == 0
    velocity_and_gradient(policy)
    assert counter.frame_count > 0


def test_without_lora_the_blocks_are_those_of_the_base_model(policy):
    embeds, x = policy.encode(["a bag", "a boot", "a coat"]), noise(policy)
    base, tuned = (make(embeds, 1.0)(x, 0.6).detach() for make in (policy.reference_velocity, policy.velocity))
    counted(policy)
    for _ in range(2):  # to and fro
        assert torch.equal(policy.reference_velocity(embeds, 1.0)(x, 0.6), base)
        assert torch.equal(policy.velocity(embeds, 1.0)(x, 0.6).detach(), tuned)


def test_the_product_with_the_jacobian_of_the_base_is_that_of_the_eager_blocks(policy):
    embeds, x = policy.encode(["a bag", "a boot", "a coat"]), noise(policy)
    eager = policy.reference_product(embeds, 1.0)(x, 0.6, torch.ones_like(x))
    counted(policy)
    for one, other in zip(policy.reference_product(embeds, 1.0)(x, 0.6, torch.ones_like(x)), eager, strict=True):
        assert largest_error(one, other) < 1e-6


def test_both_halves_of_guidance_count_as_one_batch(policy):
    eager, counter = velocity_and_gradient(policy, guidance_scale=2.0), counted(policy, [2 * BATCH])
    assert largest_error(velocity_and_gradient(policy, guidance_scale=2.0)[1], eager[1]) < 1e-5
    assert counter.frame_count > 0


# --- when -----------------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_sampler_and_training(config):
    config.sample.batch_size, config.train.batch_size = 8, 2
    assert batch_sizes(resolve(config, 1, cuda=False)) == {8, 2}
    assert batch_sizes(resolve(config, 2, cuda=False)) == {4, 2}
    config.sample.guidance_scale = 2.0
    assert batch_sizes(resolve(config, 1, cuda=False)) == {16, 4}


def test_auto_compiles_a_long_run_and_no_short_one(config, monkeypatch):
    config.compile = "auto"
    config.num_epochs = 10  # of 8 images in 4 steps
    monkeypatch.setattr("flow_grpo.compilation.PAYS_FROM", 321)
    assert not is_compiled(resolve(config, 1, cuda=False))
    monkeypatch.setattr("flow_grpo.compilation.PAYS_FROM", 320)
    assert is_compiled(resolve(config, 1, cuda=False))
    assert not is_compiled(resolve(config, 2, cuda=False))
    config.max_seconds = 60.0
    assert not is_compiled(resolve(config, 1, cuda=False))


def test_of_a_full_fine_tuning_the_frozen_copy_is_compiled_too(config, build):
    config.compile, config.use_lora, config.train.beta = "on", False, 0.1
    policy = build(config).policy
    for transformer in (policy.transformer, policy._reference):
        assert all(block.forward.__wrapped__.__self__ is block for block in blocks_of(transformer))
    assert policy.transformer is not policy._reference


def test_nothing_is_compiled_unless_it_is_asked_for(config, build):
    assert build(config).policy._compiled is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.ratio": "ode_step"}, "has no second derivative"),
        ({"sharding": "full"}, 'config.sharding = "full"'),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(config, changes, words):
    config.compile = "on"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=words):
        resolve(config, 1, cuda=False)


def test_without_a_compiler_the_sentence_names_it(config, monkeypatch):
    config.compile = "on"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler"):
        resolve(config, 1, cuda=False)
    config.compile = "auto"
    config.num_epochs = 100_000
    assert not is_compiled(resolve(config, 1, cuda=False))
