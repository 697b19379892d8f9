"""What every family must do, on a random tiny pipeline of its own classes, against the stock pipeline."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flow_grpo.compilation import Compiled
from flow_grpo.entropy import DivergenceEstimator, divergence
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.evaluation import evaluate
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.models.loras import load_lora
from flow_grpo.models.pipeline_files import expected_family
from flow_grpo.models.registry import UNMASKED
from flow_grpo.randomness import keyed_generator
from flow_grpo.settings import resolve
from flow_grpo.training import checkpoint
from tests.conftest import by_method
from tests.lora_writers import keyed, kohya, merge, random_lora, save
from tests.models.families import CASES, Case
from tests.test_divergence import exact_trace
from tests.training.saving import train, weights

PROMPTS = ["a bag", "a red coat"]
EXACTLY_AS_STOCK = 1e-5  # largest difference of a pixel in [0, 1], in float32


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def saved(request, tmp_path_factory) -> tuple[Case, Path]:
    """A family, and the folder of its tiny pipeline."""
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.build().save_pretrained(folder)
    return request.param, folder


@pytest.fixture
def small(config, saved):
    """`config` for the family's pipeline: images of 32 x 32, a batch of 4, 4 steps."""
    case, folder = saved
    config.pretrained.model, config.max_sequence_length = str(folder), case.max_sequence_length
    config.sample.groups_per_epoch, config.eval.num_prompts = 2, 2
    return config


def draw(n):
    return [keyed_generator(0, "test", i) for i in range(n)]


def stock(folder: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_images(pipeline, case: Case, policy, scale: float, negatives: list[str] | None = None):
    """Of PROMPTS, from the noise of `draw`, packed as the pipeline itself packs noise."""
    config, (height, width) = policy.settings.config, policy.settings.image_size
    arguments = dict(case.unguided if scale == 1 else case.guided(scale))
    if negatives is not None:
        arguments |= case.away_from(pipeline, list(negatives), config.max_sequence_length)
    return pipeline(  # Z-Image's writes its template into the list
        prompt=list(PROMPTS), generator=draw(2), num_inference_steps=config.eval.num_steps, height=height, width=width,
        max_sequence_length=config.max_sequence_length, output_type="pt", **arguments,
    ).images  # fmt: skip


def our_images(policy):
    with torch.no_grad():
        return policy.decode(policy.sample_ode(PROMPTS, draw(2)).final_latents)


# --- the same images --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=["square", "not-square"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_equal_the_stock_pipelines_from_the_same_noise(small, saved, build, scale, size, steps):
    case, folder = saved
    small.height, small.width = size
    small.eval.guidance_scale, small.eval.num_steps = scale, steps
    policy = build(small).policy
    ours, theirs = our_images(policy), stock_images(stock(folder), case, policy, scale)
    assert ours.shape == (2, 3, *size)
    assert (ours - theirs).abs().max() < EXACTLY_AS_STOCK
    assert theirs.std() > 0.01  # there is something to compare


def test_images_away_from_negative_prompts_equal_the_stock_pipelines(small, saved, build, tmp_path):
    """One of the configuration's, and one of a prompt's own line."""
    case, folder = saved
    own, lines = "a sandal", [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "negative_prompt": "a sandal"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small.prompts.train = small.prompts.test = str(path)
    small.eval.guidance_scale, small.negative_prompt = 3.0, "a red boot and a bag"
    policy, pipeline = build(small).policy, stock(folder)
    ours, theirs = our_images(policy), stock_images(pipeline, case, policy, 3.0, [small.negative_prompt, own])
    assert (ours - theirs).abs().max() < EXACTLY_AS_STOCK
    for wrong in ([small.negative_prompt] * 2, [own] * 2, ["", own]):
        assert (ours - stock_images(pipeline, case, policy, 3.0, wrong)).abs().max() > 1e-3


def test_guidance_of_another_scale_gives_other_images(small, saved, build):
    case, folder = saved
    small.eval.guidance_scale = 3.0
    policy = build(small).policy
    assert (our_images(policy) - stock_images(stock(folder), case, policy, 3.5)).abs().max() > 1e-4


def test_prompts_differ_in_length_and_each_has_the_velocity_it_has_alone(small, build):
    policy = build(small).policy
    embeds, x = policy.encode(["a", "a red coat and a bag"]), policy.noise(draw(2))
    with torch.no_grad():
        together = policy.velocity(embeds, 3.0)(x, 0.5)
        alone = torch.cat([policy.velocity(policy.encode([p]), 3.0)(x[i : i + 1], 0.5)
                           for i, p in enumerate(["a", "a red coat and a bag"])])  # fmt: skip
    assert (together - alone).abs().max() < 1e-5


# --- latents and images ------------------------------------------------------------------------------


def test_latents_have_the_shape_that_is_promised_and_images_are_encoded_to_it(small, build):
    small.height, small.width = 48, 32
    policy = build(small).policy
    x = policy.noise(draw(2))
    images = policy.decode(x)
    assert x.shape[1:] == policy.latent_shape
    assert images.shape == (2, 3, 48, 32)
    assert policy.family.encode_image(images).shape == x.shape


def test_encoding_undoes_the_normalisation_that_decoding_does(small, build):
    """With an autoencoder that is linear and its own inverse, latents come back."""
    family = build(small).policy.family
    seen = []
    latents = torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    vae_decode, vae_encode = family.vae.decode, family.vae.encode

    def decode(z, **arguments):
        seen.append(z)
        return vae_decode(z, **arguments)

    def encode(images, **arguments):
        posterior = vae_encode(images, **arguments)
        posterior.latent_dist.mode = lambda: seen[0]
        return posterior

    family.vae.decode, family.vae.encode = decode, encode
    images = family.decode(latents)
    torch.testing.assert_close(family.encode_image(images), latents, rtol=1e-5, atol=1e-5)


def test_decoding_carries_a_gradient_to_every_latent(small, build):
    policy = build(small).policy
    latents = (0.1 * policy.noise(draw(1))).requires_grad_()
    policy.decode(latents).square().sum().backward()
    assert (latents.grad != 0).all()


# --- the density -------------------------------------------------------------------------------------


def field_in_float64(policy):
    """The unguided velocity of a prompt, and a point of 16 x 16 pixels."""
    policy.transformer.double()
    embeds = policy.encode(PROMPTS[:1])
    pooled = embeds.pooled_prompt_embeds
    embeds = replace(
        embeds,
        prompt_embeds=embeds.prompt_embeds.double(),
        pooled_prompt_embeds=None if pooled is None else pooled.double(),
    )
    shape = policy.family.latent_shape(16, 16)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(latents, sigma):
        return policy.family.velocity(policy.transformer, latents, sigma, embeds[[0] * len(latents)])

    return velocity, x


def test_the_divergence_is_the_exact_trace_in_float64(small, build):
    velocity, x = field_in_float64(build(small).policy)
    found = divergence(velocity, x, 0.4, DivergenceEstimator(exact=True, chunk=1))
    torch.testing.assert_close(found.mean, exact_trace(velocity, x, 0.4), rtol=1e-9, atol=1e-9)


def test_what_networks_compute_in_float32_moves_the_divergence_by_less_than_1e_5(small, build, monkeypatch):
    """The variance of RMSNorm and rotary embeddings, whatever the weights; here the reference is float64 throughout."""
    velocity, x = field_in_float64(build(small).policy)
    found = divergence(velocity, x, 0.4, DivergenceEstimator(exact=True, chunk=1)).mean
    keep_float64(monkeypatch)
    units = torch.eye(x.numel(), dtype=torch.float64).view(-1, 1, *x.shape[1:])
    with torch.no_grad():
        wide = sum(((velocity(x + 1e-5 * z, 0.4) - velocity(x - 1e-5 * z, 0.4)) * z).sum() / 2e-5 for z in units)
    torch.testing.assert_close(found, wide[None], rtol=1e-5, atol=1e-7)


def keep_float64(monkeypatch):
    """Casts of float64 to float32 do nothing."""
    narrow, cast = torch.Tensor.float, torch.Tensor.to

    def to(tensor, *args, **kwargs):
        return tensor if tensor.dtype == torch.float64 and args == (torch.float32,) else cast(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
    monkeypatch.setattr(torch.Tensor, "to", to)


# --- training ----------------------------------------------------------------------------------------


def test_grpo_trains_and_the_ratio_of_unchanged_weights_is_1(small, build):
    small.sample.guidance_scale = 3.0
    parts = build(small)
    before = weights(parts)
    metrics = parts.train()
    assert metrics["ratio_error"] < 1e-5
    assert metrics["skipped_updates"] == 0
    assert any((a != b).any() for a, b in zip(before, weights(parts), strict=True))


def test_drtune_in_one_and_in_two_passes_takes_the_same_step(small, build):
    by_method(small, "drtune")
    ends = []
    for two_pass in (False, True):
        small.drtune.two_pass, small.run_name = two_pass, f"two-pass-{two_pass}"
        parts = build(small)
        assert parts.train()["skipped_updates"] == 0
        ends.append(
            torch.cat([p.grad.flatten() if p.grad is not None else p.flatten() for p in parts.policy.trainable])
        )
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-6)


def test_anchored_trains(small, build):
    by_method(small, "anchored")
    metrics = build(small).train()
    assert metrics["skipped_updates"] == 0
    assert metrics["loss"] > 0


def test_everything_is_evaluated(small, build):
    small.eval_freq, small.eval_diversity, small.eval_ode_log_prob = 1, True, True
    small.entropy.num_prompts = small.entropy.num_image_per_prompt = 2
    parts = build(small)
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    metrics = evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, "eval").metrics
    for name in ("reward/total", "judge/accuracy", "diversity/vendi", "ode_log_prob/mean"):
        assert math.isfinite(metrics[f"eval/{name}"])


def test_every_layer_of_the_familys_lora_has_a_gradient_and_checkpointing_does_not_change_it(small, build):
    gradients = []
    for checkpointing in (False, True):
        small.gradient_checkpointing, small.run_name = checkpointing, f"checkpointing-{checkpointing}"
        policy = build(small).policy
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.trainable:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        velocity = policy.velocity(policy.encode(["a", "a red coat and a bag"]), 3.0)
        velocity(policy.noise(draw(2)), 0.5).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.trainable])
    assert all(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_modules_without_effect_have_no_gradient_and_the_others_have_one(small, build):
    small.use_lora = False
    policy = build(small).policy
    policy.velocity(policy.encode(PROMPTS), 3.0)(policy.noise(draw(2)), 0.5).square().mean().backward()
    dead = {name.removesuffix(".weight") for name, p in policy.named_trainable.items()
            if name.endswith(".weight") and p.ndim == 2 and (p.grad is None or not p.grad.any())}  # fmt: skip
    assert dead == set(policy.family.modules_without_effect())


TRAINERS = {
    "diffusers": lambda module, matrix: f"transformer.{module}.{matrix}.weight",
    "peft": lambda module, matrix: f"base_model.model.{module}.{matrix}.weight",
    "ai-toolkit": lambda module, matrix: f"diffusion_model.{module}.{matrix}.weight",
    "kohya": None,
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_lora_of_another_trainer_is_loaded_whole_and_is_what_it_says(small, build, tmp_path, trainer):
    small.use_lora = False
    policy = build(small).policy
    targets = expected_family(small.pretrained.model).lora_targets
    modules = [name for name, _ in policy.transformer.named_modules() if name.endswith(targets)]
    lora = random_lora(policy.transformer, alpha=4.0, modules=modules)
    key, merged = TRAINERS[trainer], copy.deepcopy(policy.transformer)
    merge(merged, lora)
    loaded = load_lora(policy.transformer, save(tmp_path, keyed(lora, key)) if key else kohya(tmp_path, lora))
    assert (loaded.layers, loaded.unknown) == (len(modules), ())
    embeds, x = policy.encode(PROMPTS), policy.noise(draw(2))
    with torch.no_grad():
        base, theirs = (policy.family.velocity(network, x, 0.5, embeds) for network in (policy.transformer, merged))
    assert (base - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_lora_trained_here_gives_the_stock_pipeline_and_a_run_that_starts_from_it_the_same_images(
    small, saved, build
):
    case, folder = saved
    by_method(small, "drtune")
    small.train.learning_rate, small.eval.guidance_scale = 2e-2, 3.0
    parts = build(small)
    for _ in range(2):
        parts.train()
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    lora, pipeline = parts.run.folder / "checkpoints/checkpoint-000002/lora", stock(folder)
    base = stock_images(pipeline, case, parts.policy, 3.0)
    pipeline.load_lora_weights(lora)
    theirs = stock_images(pipeline, case, parts.policy, 3.0)
    assert (our_images(parts.policy) - theirs).abs().max() < EXACTLY_AS_STOCK
    assert (base - theirs).abs().max() > 1e-3
    small.pretrained.lora, small.run_name = str(lora), "begun"
    assert (our_images(build(small).policy) - theirs).abs().max() < EXACTLY_AS_STOCK


def test_resumed_equals_unbroken_bit_for_bit(small, build):
    small.save_freq, small.run_name, small.num_epochs = 1, "unbroken", 2
    unbroken = train(small, build)
    small.run_name, small.num_epochs = "broken", 1
    broken = train(small, build)
    small.resume_from, small.num_epochs = str(broken.run.folder), 2
    resumed = train(small, build)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))


# --- speed ----------------------------------------------------------------------------------------------


def velocity_and_gradient(policy):
    velocity = policy.velocity(policy.encode(PROMPTS), 1.0)(policy.noise(draw(2)), 0.5)
    return velocity.detach(), *torch.autograd.grad(velocity.square().mean(), policy.trainable, allow_unused=True)


def test_compiled_blocks_give_the_velocity_and_the_gradients_of_the_eager_ones(small, saved, build):
    """Of two families that differ most, by the graphs that inductor is given; of the others by torch's first ones."""
    policy = build(small).policy
    with torch.no_grad():
        for i, parameter in enumerate(policy.trainable):
            parameter += 0.05 * torch.randn(parameter.shape, generator=keyed_generator(0, "weights", i))
    eager = velocity_and_gradient(policy)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager" if saved[0].name in ("sd3", "z_image") else "eager")
    policy._compiled = Compiled([policy.transformer], [len(PROMPTS)], backend=counter)
    for one, other in zip(velocity_and_gradient(policy), eager, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert counter.frame_count > 0


def test_prompts_of_other_lengths_compile_nothing_anew(small, build, monkeypatch):
    """Of up to 64 tokens; of up to 32 where the network itself pads to multiples of that, as Z-Image's.

    One more graph is allowed: of prompts that differ in length, which have a mask in some networks.
    """
    monkeypatch.setattr("flow_grpo.policy.is_compiled", lambda settings: True)
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr("flow_grpo.policy.Compiled", partial(Compiled, backend=counter))
    small.sample.batch_size = small.train.batch_size = 2
    policy = build(small).policy
    torch._dynamo.reset()
    x, counts = policy.noise(draw(2)), []
    with torch.no_grad():
        for prompts in (PROMPTS, ["a", "a bag"], ["a coat", "a"]):
            policy.velocity(policy.encode(prompts), 1.0)(x, 0.5)
            counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1] - counts[0] in (0, 1)
    assert counts[2] == counts[1]


def test_the_attention_that_is_asked_for_computes_the_same(small, saved, build):
    case, _ = saved
    if case.name == "sd3":  # its attention is torch's own, with none to choose
        small.pretrained.attention = "_native_math"
        with pytest.raises(ConfigError, match=r"pretrained\.attention = '_native_math' has no effect on an SD3"):
            build(small)
        return
    usual = velocity_and_gradient(build(small).policy)[0]
    small.pretrained.attention = "_native_math"
    policy = build(small).policy
    try:
        torch.testing.assert_close(velocity_and_gradient(policy)[0], usual, rtol=1e-4, atol=1e-5)
        chosen = {m.processor._attention_backend for m in policy.transformer.modules() if hasattr(m, "processor")}
        assert {backend.value for backend in chosen} == {"_native_math"}
    finally:
        policy.transformer.reset_attention_backend()  # diffusers keeps it for the whole process, too


@pytest.mark.parametrize("name", UNMASKED)
def test_an_attention_without_masks_is_not_for_families_whose_prompts_differ_in_length(small, saved, name):
    case, _ = saved
    small.pretrained.attention = name
    if case.name in ("flux", "flux2_klein"):
        resolve(small, 1, cuda=False)
        return
    words = "has no effect on" if case.name == "sd3" else f"{name!r} takes no mask, which .* it takes .*native"
    with pytest.raises(ConfigError, match=words):
        resolve(small, 1, cuda=False)


def test_an_attention_whose_library_is_missing_is_one_sentence(small, saved, build, monkeypatch):
    case, _ = saved
    small.pretrained.attention = "xformers"

    def missing(backend):
        raise RuntimeError(f"{backend} needs a library\nand more")

    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", missing)
    words = "no effect on" if case.name == "sd3" else "'xformers' cannot be had here: .* needs a library$"
    with pytest.raises(ConfigError, match=words):
        build(small)
