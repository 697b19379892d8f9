"""Loading, freezing, prompts, decoding, averaged weights."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flow_grpo.errors import ConfigError
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import PromptEmbeds
from tests.velocities import PeakMemory


@pytest.fixture
def policy(config, build):
    return build(config).policy


def draw(n, seed=0):
    return [keyed_generator(seed, "test", i) for i in range(n)]


def test_only_lora_is_trainable_and_it_is_float32(config, build):
    config.mixed_precision = "bf16"
    policy = build(config).policy
    names = [name for name, p in policy.transformer.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert all(p.dtype == torch.float32 for p in policy.trainable)
    assert policy.transformer.proj_out.weight.dtype == torch.bfloat16
    assert next(policy.vae.parameters()).dtype == torch.float32
    for module in (policy.vae, policy.pipeline.text_encoder, policy.pipeline.text_encoder_3):
        assert not any(p.requires_grad for p in module.parameters())


def test_loading_all_weights_for_training_warns_of_nothing(config, build, monkeypatch):
    """diffusers' own handler writes to the user's screen."""
    config.use_lora, heard = False, logging.Handler()
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(heard, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [heard])
    build(config)
    assert [record.getMessage() for record in records] == []


def test_before_training_lora_changes_nothing(policy, random_models):
    stock = StableDiffusion3Pipeline.from_pretrained(random_models / "sd3", torch_dtype=torch.float32)
    embeds, x = policy.encode(["a bag", "a boot"]), policy.noise(draw(2))
    theirs = stock.transformer(
        x, embeds.prompt_embeds, embeds.pooled_prompt_embeds, torch.full((2,), 300.0), return_dict=False
    )
    torch.testing.assert_close(policy.velocity(embeds, 1.0)(x, 0.3), theirs[0], rtol=1e-5, atol=1e-5)


def test_the_lora_start_depends_on_the_seed_alone(config, build):
    starts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config.run_name, config.seed = name, seed
        torch.manual_seed(len(starts))
        starts.append([p.detach().clone() for p in build(config).policy.trainable])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


def test_embeddings_equal_stock_diffusers(policy):
    prompts = ["a bag", "a red coat", "a bag"]
    embeds = policy.encode(prompts)
    expected, _, pooled, _ = policy.pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    torch.testing.assert_close(embeds.prompt_embeds, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embeds.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("text", "precision"), [("bf16", "no"), ("fp32", "bf16")])
def test_text_encoders_of_another_precision_give_the_transformer_its_own(config, build, text, precision):
    config.pretrained.text_dtype, config.mixed_precision = text, precision
    policy = build(config).policy
    loaded = {"bf16": torch.bfloat16, "fp32": torch.float32}[text]
    assert policy.pipeline.text_encoder_3.dtype == policy.pipeline.text_encoder.dtype == loaded
    with torch.no_grad():
        velocity = policy.velocity(policy.encode(["a bag"]), 3.0)(policy.noise(draw(1)), 0.5)
    assert velocity.isfinite().all()


def test_an_autoencoder_in_bf16_decodes_to_float32_within_its_rounding(config, build):
    images = []
    for dtype in ("fp32", "bf16"):
        config.pretrained.vae_dtype, config.run_name = dtype, dtype
        policy = build(config).policy
        with torch.no_grad():
            images.append(policy.decode(0.5 * policy.noise(draw(2))))
    assert images[1].dtype == torch.float32
    difference = (images[0] - images[1]).abs()
    assert 0 < difference.mean() < 0.005
    assert difference.max() < 0.06


def test_a_checkpointed_decode_has_the_same_gradient_and_keeps_less(config, build):
    config.resolution, found, peaks = 64, [], []
    for checkpointing in (False, True):
        config.pretrained.vae_checkpointing, config.run_name = checkpointing, str(checkpointing)
        policy = build(config).policy
        latents = policy.noise(draw(1)).requires_grad_()
        with PeakMemory() as memory:
            images = policy.decode(latents)
            weights = torch.linspace(-1, 1, images.numel()).view_as(images)
            (gradient,) = torch.autograd.grad((weights * images).sum(), latents)
        found.append((images.detach(), gradient))
        peaks.append(memory.peak)
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)
    assert found[0][1].abs().max() > 0.01
    assert peaks[1] < 0.75 * peaks[0]  # without checkpointing the same run keeps every activation


def test_a_prompt_is_encoded_once(policy):
    calls = []
    original = policy.pipeline.encode_prompt
    policy.pipeline.encode_prompt = lambda *args, **kwargs: calls.append(args[0]) or original(*args, **kwargs)
    policy.encode(["a bag", "a boot", "a bag"])
    policy.encode(["a boot"])
    assert calls == ["a bag", "a boot"]


def test_our_samples_equal_stock_diffusers(config, build, random_models):
    """The ODE sampler, guidance, scheduler and decoder, against the library's own pipeline."""
    config.eval.guidance_scale, config.eval.num_steps = 4.5, 6
    policy = build(config).policy
    prompts, x = ["a bag", "a red coat"], policy.noise(draw(2))
    with torch.no_grad():
        ours = policy.decode(policy.sample_ode(prompts, draw(2)).final_latents)
    stock = StableDiffusion3Pipeline.from_pretrained(random_models / "sd3", torch_dtype=torch.float32)
    theirs = stock(
        prompts, latents=x, num_inference_steps=6, guidance_scale=4.5, height=32, width=32,
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4


def write_prompts(config, tmp_path, *lines: dict) -> None:
    """Training prompts and test prompts of these lines."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.prompts.train = config.prompts.test = str(path)


def test_embeddings_keep_their_negative_prompts_when_they_are_chosen_and_joined(config, build, tmp_path):
    config.negative_prompt, config.sample.guidance_scale = "grey", 2.0
    write_prompts(config, tmp_path, {"prompt": "a bag"}, {"prompt": "a boot", "negative_prompt": "a sandal"})
    embeds = build(config).policy.encode(["a bag", "a boot", "a bag"])
    assert embeds.negatives == ("grey", "a sandal", "grey")
    for rows in (slice(1, None), [1, 2], torch.tensor([1, 2])):
        assert embeds[rows].negatives == ("a sandal", "grey")
    assert PromptEmbeds.cat([embeds[:1], embeds[1:]]).negatives == embeds.negatives


@pytest.mark.parametrize("velocity", ["velocity", "reference_velocity"])
def test_the_velocity_leads_away_from_each_prompts_negative_one(config, build, tmp_path, velocity):
    config.sample.guidance_scale = 3.0
    write_prompts(config, tmp_path, {"prompt": "a bag", "negative_prompt": "a sandal"}, {"prompt": "a boot"})
    policy = build(config).policy
    x, of = policy.noise(draw(2)), getattr(policy, velocity)
    with torch.no_grad():
        found = of(policy.encode(["a bag", "a boot"]), 3.0)(x, 0.5)
        with_prompt, without = (of(policy.encode(p), 1.0)(x, 0.5) for p in (["a bag", "a boot"], ["a sandal", ""]))
    torch.testing.assert_close(found, without + 3 * (with_prompt - without), rtol=1e-5, atol=1e-5)


def test_decode_is_differentiable_and_in_range(policy):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = policy.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    images.sum().backward()
    assert (latents.grad != 0).all()


def test_network_evaluations_count_both_halves_of_a_guided_forward(policy):
    embeds, x = policy.encode(["a bag"] * 3), policy.noise(draw(3))
    policy.velocity(embeds, 1.0)(x, 0.5)
    policy.velocity(embeds, 4.5)(x, 0.5)
    policy.reference_velocity(embeds, 1.0)(x, 0.5)
    assert policy.network_evaluations == 3 + 6 + 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_models_product_is_autograds_under_untouched_weights(config, build, checkpointing):
    config.gradient_checkpointing = checkpointing
    policy = build(config).policy
    embeds, x, a = policy.encode(["a bag"] * 2), policy.noise(draw(2)), policy.noise(draw(2))
    seen = x.clone().requires_grad_()
    v = policy.velocity(embeds, 1.0)(seen, 0.5)  # B = 0: the base model's
    (expected,) = torch.autograd.grad(v, seen, a)
    with torch.no_grad():
        for p in policy.trainable:
            p += 0.1
    found_v, found = policy.reference_product(embeds, 1.0)(x, 0.5, a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found_v, v.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(policy.velocity(embeds, 1.0)(x, 0.5), found_v, atol=1e-2)
    assert all(p.requires_grad and p.grad is None for p in policy.trainable)


def test_averaged_weights_are_used_inside_the_block_only(policy):
    current = [p.detach().clone() for p in policy.trainable]
    for shadow in policy.ema.shadow_params:
        shadow.fill_(0.125)
    with policy.ema_weights():
        assert all((p == 0.125).all() for p in policy.trainable)
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable, current, strict=True))


def test_gradient_checkpointing_gives_the_same_gradient(config, build):
    gradients = []
    for checkpointing in (False, True):
        config.gradient_checkpointing, config.run_name = checkpointing, f"run-{checkpointing}"
        policy = build(config).policy
        policy.velocity(policy.encode(["a bag"]), 1.0)(policy.noise(draw(1)), 0.5).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert gradients[0].norm() > 0


def test_lora_on_modules_that_do_not_exist_is_one_sentence(config, build):
    config.lora.target_modules = ("attn.nope",)
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        build(config)


def test_a_folder_that_is_no_sd3_pipeline_is_one_sentence(config, build, random_models):
    config.pretrained.model = str(random_models / "clip")
    with pytest.raises(ConfigError, match=r"pretrained\.model"):
        build(config)


# --- a share of the tuned velocity ------------------------------------------------------------------------


def latents_at(config, build, share, tuned=True):
    """x_0 by the ODE with a share of the tuned velocity, and the network evaluations that it took."""
    config.eval.tuned_share, config.run_name = share, f"{config.use_lora}-{share}-{tuned}"
    policy = build(config).policy
    if tuned:
        with torch.no_grad():
            for number, parameter in enumerate(policy.trainable):
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        return policy.sample_ode(["a bag", "a boot"], draw(2)).final_latents, policy.network_evaluations


@pytest.mark.parametrize("lora", [True, False])
def test_images_with_no_share_of_the_tuned_velocity_are_the_bases(config, build, lora):
    config.use_lora = lora
    base, spent = latents_at(config, build, (1.0, 1.0), tuned=False)
    trained, same = latents_at(config, build, (1.0, 1.0))
    untuned, also = latents_at(config, build, (0.0, 0.0))
    assert torch.equal(untuned, base)
    assert not torch.allclose(trained, base, atol=1e-3)
    assert spent == same == also  # neither pays for the other


def test_images_with_half_a_share_are_those_of_the_mean_of_both_velocities(config, build):
    found, spent = latents_at(config, build, (0.5, 0.5))
    config.run_name = "reference"
    policy = build(config).policy
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        embeds, x = policy.encode(["a bag", "a boot"]), policy.noise(draw(2))
        both = policy.velocity(embeds, 1.0), policy.reference_velocity(embeds, 1.0)
        sigmas = policy.sigmas(4).tolist()
        for now, after in pairwise(sigmas):
            x = x + (after - now) * (both[0](x, now) + both[1](x, now)) / 2
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
    assert spent == 2 * 2 * 4


def test_old_weights_are_those_that_were_kept_and_the_current_ones_come_back(policy):
    embeds, x = policy.encode(["a bag"]), policy.noise(draw(1))
    policy.keep_old()
    before = policy.velocity(embeds, 1.0)(x, 0.5).detach()
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.05
    moved = policy.velocity(embeds, 1.0)(x, 0.5)
    assert torch.equal(policy.old_velocity(embeds, 1.0)(x, 0.5), before)
    assert not policy.old_velocity(embeds, 1.0)(x, 0.5).requires_grad
    assert torch.equal(policy.velocity(embeds, 1.0)(x, 0.5), moved)
    moved.sum().backward()  # a graph of before the exchange is whole
    assert all(p.grad is not None for p in policy.trainable)
    policy.keep_old()  # there are older ones
    assert torch.equal(policy.old_velocity(embeds, 1.0)(x, 0.5), before)


def test_old_weights_come_back_after_an_error_too(policy):
    policy.keep_old()
    current = [p.data_ptr() for p in policy.trainable]

    def breaks_off():
        with policy.old_weights():
            assert current != [p.data_ptr() for p in policy.trainable]
            raise KeyError

    with pytest.raises(KeyError):
        breaks_off()
    assert current == [p.data_ptr() for p in policy.trainable]


# --- precision ------------------------------------------------------------------------------------------


def test_in_bf16_velocities_are_rounded_and_float32_and_afterwards_they_are_as_before(policy):
    velocity, x = policy.velocity(policy.encode(["a bag", "a boot"]), 1.0), policy.noise(draw(2))
    before = velocity(x, 0.5)
    with policy.in_precision("bf16"):
        rounded = velocity(x, 0.5)
    with policy.in_precision(""):
        assert torch.equal(velocity(x, 0.5), before)
    assert torch.equal(velocity(x, 0.5), before)
    assert rounded.dtype == torch.float32
    error = ((rounded - before).norm() / before.norm()).item()
    assert 1e-4 < error < 3e-2
