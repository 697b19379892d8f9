"""The anchor on the base model's images: its gradient by hand, what it draws, and that it composes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from ml_collections import FrozenConfigDict

from flow_grpo.forward_process import stratified_times
from flow_grpo.loops.forward_kl import accumulate_forward_kl, draw_base_images
from flow_grpo.loops.update import apply_update
from flow_grpo.randomness import keyed_generator, keyed_stream
from flow_grpo.runs.progress import Counters
from flow_grpo.types import BaseImages
from tests.conftest import by_method
from tests.loops.tiny_net import TinyNet, relative


def perturb(policy):
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def as_policy(net, rank=0, processes=1):
    """Six images in eight dimensions in float64; an update takes four, over all processes."""
    config = {"seed": 3, "train": {"batch_size": 3}, "forward_kl": {"draws": 2}}
    plan = SimpleNamespace(images_per_update=4 // processes)
    latents = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return SimpleNamespace(
        settings=SimpleNamespace(config=FrozenConfigDict(config), plan=plan, num_processes=processes),
        accelerator=SimpleNamespace(process_index=rank, backward=torch.Tensor.backward),
        device=torch.device("cpu"),
        base_images=BaseImages(("a bag",) * 6, latents),
        encode=lambda prompts: None,
        velocity=lambda embeds, guidance: net.forward if guidance == 1.0 else None,
        noise=lambda generators: torch.stack([torch.randn(8, generator=g, dtype=torch.float64) for g in generators]),
    )


UPDATES = Counters(updates=4, nonfinite_updates=1)  # five have been tried


def by_hand(net, base, sign=1.0):
    """The loss, image by image and time by time; `sign` -1: of a velocity that runs the other way."""
    chosen = keyed_stream(6, 3, "forward KL order", start=5 * 4, count=4)
    total = 0.0
    for place, image in enumerate(chosen):
        generator = keyed_generator(3, "forward KL", 5, place)
        for t in stratified_times(2, keyed_generator(3, "forward KL times", 5)):
            e = torch.randn(8, generator=generator, dtype=torch.float64)
            x_t = (1 - t) * base[image] + t * e
            error = net(x_t[None], t)[0] - sign * (e - base[image])
            total = total + error.dot(error) / 8
    return total / 8


def test_the_gradient_is_that_of_the_weighted_flow_matching_loss_in_float64():
    net = TinyNet()
    policy = as_policy(net)
    loss = accumulate_forward_kl(policy, SimpleNamespace(counters=UPDATES), 0.7)
    expected = by_hand(net, policy.base_images.latents)
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-6, atol=0)
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(0.7 * expected, tuple(net.parameters()))])
    assert relative(net.gradient(), reference) < 1e-9
    twin = torch.autograd.grad(0.7 * by_hand(net, policy.base_images.latents, -1.0), tuple(net.parameters()))
    assert relative(torch.cat([g.flatten() for g in twin]), reference) > 0.1


def test_two_processes_take_the_same_images_times_and_noises_as_one():
    whole, halves = TinyNet(), [TinyNet(), TinyNet()]
    run = SimpleNamespace(counters=UPDATES)
    accumulate_forward_kl(as_policy(whole), run, 1.0)
    for rank, net in enumerate(halves):
        accumulate_forward_kl(as_policy(net, rank, 2), run, 1.0)
    mean = (halves[0].gradient() + halves[1].gradient()) / 2
    assert relative(mean, whole.gradient()) < 1e-12
    assert relative(halves[0].gradient(), whole.gradient()) > 0.1


def test_another_update_takes_other_images():
    first, second = TinyNet(), TinyNet()
    accumulate_forward_kl(as_policy(first), SimpleNamespace(counters=Counters(updates=4)), 1.0)
    accumulate_forward_kl(as_policy(second), SimpleNamespace(counters=UPDATES), 1.0)
    assert relative(first.gradient(), second.gradient()) > 0.01


# --- of a model ------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False])
def parts(config, build, request):
    """With LoRA and without."""
    config.use_lora, config.train.forward_kl = request.param, 0.5
    config.forward_kl.images, config.forward_kl.draws, config.sample.batch_size = 6, 2, 4
    config.sample.guidance_scale = 3.0  # which plays no part
    return build(config)


def test_the_images_are_the_base_models_without_guidance(parts):
    policy = parts.policy
    before = draw_base_images(policy, parts.run)
    perturb(policy)
    after = draw_base_images(policy, parts.run)
    assert before.prompts == ("a bag", "a boot", "a red coat", "a sandal", "a bag", "a boot")
    assert torch.equal(after.latents, before.latents)
    generator = keyed_generator(parts.settings.config.seed, "forward KL image", 4)
    velocity = policy.reference_velocity(policy.encode(["a bag"]), 1.0)
    x, sigmas = policy.noise([generator]), policy.sigmas(4).tolist()
    for sigma, after_it in pairwise(sigmas):
        x = x + (after_it - sigma) * velocity(x, sigma)
    torch.testing.assert_close(before.latents[4:5], x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.latents[4], before.latents[0], atol=0.1)


@pytest.mark.parametrize(("resumed", "epoch", "paid"), [(False, 0, True), (True, 0, True), (True, 1, False)])
def test_a_run_pays_for_the_images_once_in_evaluations_and_seconds(parts, monkeypatch, resumed, epoch, paid):
    """A session that goes on after the first epoch draws them again, and counts what an update costs without."""
    clock = iter(range(1000))
    monkeypatch.setattr(parts.run, "_now", lambda: float(next(clock)))
    parts.run.resumed, parts.run.counters.epoch = resumed, epoch
    with parts.run.timer():
        accumulate_forward_kl(parts.policy, parts.run, 0.5)
    update = 8 * 2  # images, draws
    assert parts.policy.network_evaluations == update + (6 * 4 if paid else 0)
    assert parts.run.counters.seconds == (1.0 if paid else 2.0)  # 2: two readings more, less the 1 between them


def test_an_update_adds_its_gradient_to_that_of_the_method_and_its_loss_to_the_methods(parts):
    policy = parts.policy
    perturb(policy)
    accumulate_forward_kl(policy, parts.run, 0.5)
    alone = torch.cat([p.grad.flatten() for p in policy.trainable])
    seen = []
    policy.optimizer.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in policy.trainable]))
    for parameter in policy.trainable:
        parameter.grad = torch.full_like(parameter, 1e-3)
    policy.accelerator.clip_grad_norm_ = lambda *_: torch.tensor(1.0)
    terms = apply_update(policy, torch.tensor(2.0), parts.run)
    torch.testing.assert_close(seen[0], alone + 1e-3, rtol=1e-5, atol=1e-7)
    assert terms["loss"] == pytest.approx(2.0 + 0.5 * terms["forward_kl"])
    assert terms["forward_kl"] > 0


@pytest.mark.parametrize("method", ["grpo", "nft", "fdfo", "drtune", "anchored"])
def test_it_composes_with_every_family(config, build, method):
    by_method(config, method)
    config.train.forward_kl, config.forward_kl.images, config.forward_kl.draws = 0.5, 4, 1
    metrics = build(config).train()
    assert metrics["forward_kl"] > 0
    assert metrics["skipped_updates"] == 0


def test_without_a_weight_no_image_of_the_base_is_drawn(config, build):
    parts = build(config)
    assert "forward_kl" not in parts.train()
    assert parts.policy.base_images is None
