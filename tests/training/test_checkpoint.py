"""Checkpoints: exact continuation, retention, and the exported weights where others load them."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel

from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.loops import drtune
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.methods.registry import METHODS
from flow_grpo.runs.saved import find_checkpoint
from flow_grpo.training import checkpoint
from flow_grpo.training import state as training_state
from tests.conftest import by_method
from tests.saved_runs import edit_state, read_state
from tests.training.saving import checkpoints, deterministic, names, save, train, weights


@pytest.mark.parametrize("method", list(METHODS))
def test_resumed_equals_unbroken_bit_for_bit(config, build, method):
    by_method(config, method)
    config.train.updates_per_epoch, config.save_freq = 2, 1
    config.train.update({"lr_scheduler": "cosine", "lr_warmup_steps": 1, "lr_total_steps": 9})
    config.train.beta = 0.0 if METHODS[method].needs_base else 0.05
    config.run_name, config.num_epochs = "unbroken", 4
    unbroken = train(config, build)
    config.run_name, config.num_epochs = "broken", 2
    broken = train(config, build)
    config.resume_from, config.num_epochs = str(broken.run.folder), 4
    resumed = train(config, build)
    assert resumed.run.folder == broken.run.folder
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))
    pairs = zip(resumed.policy.ema.shadow_params, unbroken.policy.ema.shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    old = (resumed.policy.old or [], unbroken.policy.old or [])
    assert (len(old[0]) > 0) == (method == "nft")
    assert all(torch.equal(a, b) for a, b in zip(*old, strict=True))
    assert deterministic(resumed.run.folder) == deterministic(unbroken.run.folder)


def test_resumed_equals_unbroken_with_an_anchor_to_the_bases_images_whose_draws_go_on(config, build):
    config.train.forward_kl, config.forward_kl.images, config.forward_kl.draws = 0.5, 5, 1
    config.save_freq, config.num_epochs, config.run_name = 1, 3, "unbroken"
    unbroken = train(config, build, grpo)
    config.run_name, config.num_epochs = "broken", 2
    broken = train(config, build, grpo)
    config.resume_from, config.num_epochs = str(broken.run.folder), 3
    resumed = train(config, build, grpo)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))
    assert deterministic(resumed.run.folder) == deterministic(unbroken.run.folder)


def test_without_the_optimizers_state_resuming_is_not_exact(config, build, monkeypatch):
    config.save_freq, config.num_epochs, config.run_name = 1, 3, "unbroken"
    unbroken = train(config, build, grpo)
    config.run_name, config.num_epochs = "broken", 2
    broken = train(config, build, grpo)
    config.resume_from, config.num_epochs = str(broken.run.folder), 3
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert not all(
        torch.equal(a, b) for a, b in zip(weights(train(config, build, grpo)), weights(unbroken), strict=True)
    )


def with_8_bits(config):
    """Every weight is trained, and most have 4096 values or more."""
    config.use_lora, config.train.optimizer, config.train.updates_per_epoch = False, "adamw_8bit", 2


def test_resumed_equals_unbroken_with_moments_of_8_bits(config, build):
    with_8_bits(config)
    config.save_freq, config.num_epochs, config.run_name = 1, 3, "unbroken"
    unbroken = train(config, build)
    config.run_name, config.num_epochs = "broken", 2
    broken = train(config, build)
    saved = training_state.read(find_checkpoint(str(broken.run.folder))).of(training_state.MOMENTS)
    assert torch.uint8 in {value.dtype for name, value in saved.items() if name.startswith("state1.")}
    config.resume_from, config.num_epochs = str(broken.run.folder), 3
    resumed = train(config, build)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))
    assert deterministic(resumed.run.folder) == deterministic(unbroken.run.folder)


@pytest.mark.parametrize("method", ["grpo", "drtune"])
def test_moments_of_8_bits_train_almost_as_those_of_32(config, build, method):
    """Of what an epoch, two updates, has changed, the two are apart by 0.012 and 0.015."""
    by_method(config, method)
    with_8_bits(config)
    config.num_epochs = 1
    start, ends = weights(build(config)), {}
    for name in ("adamw", "adamw_8bit"):
        config.run_name = config.train.optimizer = name
        ends[name] = [end - begun for end, begun in zip(weights(train(config, build)), start, strict=True)]
    ours, theirs = (torch.cat([change.flatten() for change in ends[name]]) for name in ("adamw_8bit", "adamw"))
    distance = (ours - theirs).norm() / theirs.norm()
    assert 0 < distance < 0.05


def test_another_optimizer_does_not_go_on_from_its_moments(config, build):
    config.save_freq, config.num_epochs = 1, 1
    folder = train(config, build, grpo).run.folder
    config.resume_from, config.num_epochs, config.train.optimizer = str(folder), 2, "adamw_8bit"
    with pytest.raises(ConfigError, match=r"config\.train\.optimizer = 'adamw_8bit' .* 'adamw'; resume with"):
        build(config)


def test_moments_that_do_not_fit_the_weights_are_refused(config, build):
    with_8_bits(config)
    config.save_freq, config.num_epochs = 1, 1
    parts = train(config, build, grpo)
    state = training_state.read(find_checkpoint(str(parts.run.folder)))
    name = next(name for name in state.tensors if ".absmax1." in name)
    broken = replace(state, tensors={**state.tensors, name: state.tensors[name][1:]})
    with pytest.raises(ConfigError, match=f"{re.escape(name)} does not fit the model"):
        training_state.restore(parts.policy, parts.run, broken, "the file")


def test_resuming_from_an_earlier_checkpoint_forgets_what_came_after(config, build):
    config.save_freq, config.num_epochs = 1, 3
    first = train(config, build, grpo)
    before = deterministic(first.run.folder)
    config.resume_from, config.num_epochs = str(first.run.folder / "checkpoints" / "checkpoint-000001"), 2
    again = train(config, build, grpo)
    assert deterministic(again.run.folder) == before[:2]
    assert find_checkpoint(str(again.run.folder)).name == "checkpoint-000002"
    assert names(again) == ["abandoned", "checkpoint-000001", "checkpoint-000002"]
    kept = again.run.folder / "checkpoints" / "abandoned"
    assert sorted(p.name for p in kept.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_resumed_run_takes_the_present_configurations_learning_rate(config, build):
    config.save_freq, config.num_epochs = 1, 1
    first = train(config, build, grpo)
    config.resume_from, config.num_epochs = str(first.run.folder), 2
    config.train.learning_rate, config.train.ema_decay = 1e-6, 0.5
    parts = build(config)
    checkpoint.resume(parts.policy, parts.run, parts.settings)
    assert [group["lr"] for group in parts.policy.optimizer.param_groups] == [1e-6]
    assert parts.policy.ema.decay == 0.5
    assert parts.policy.ema.optimization_step == 1


def test_a_run_that_is_already_over_says_so(config, build):
    config.save_freq, config.num_epochs = 1, 1
    config.resume_from = str(train(config, build, grpo).run.folder)
    with pytest.raises(ConfigError, match=r"raise config\.num_epochs = 1 above 1\."):
        train(config, build, grpo)


def test_fewer_epochs_than_a_run_has_behind_it_are_refused_though_an_evaluation_is_due(config, build):
    config.save_freq, config.num_epochs = 1, 2
    folder = train(config, build, grpo).run.folder
    edit_state(find_checkpoint(str(folder)), evaluated=False)
    config.resume_from, config.num_epochs = str(folder), 1
    with pytest.raises(ConfigError, match=r"raise config\.num_epochs = 1 above 2\."):
        build(config)


@pytest.fixture
def trained(config, build):
    """One DRTune run whose weights are well away from the pretrained ones."""
    config.use_reward_gradient, config.train.learning_rate = True, 2e-2
    config.eval.guidance_scale = 3.0
    parts = build(config)
    for _ in range(3):
        parts.train(drtune)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    return parts, find_checkpoint(str(parts.run.folder))


@pytest.mark.parametrize("suffix", ["", "_ema"])
def test_stock_diffusers_reproduces_our_evaluation_images(trained, random_models, suffix):
    parts, folder = trained
    if suffix:
        with parts.policy.ema_weights():
            ours = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    else:
        ours = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    stock = StableDiffusion3Pipeline.from_pretrained(random_models / "sd3", torch_dtype=torch.float32)
    generators = [checkpoint_noise(p, s) for p in range(4) for s in range(2)]
    arguments = {
        "prompt": list(ours.prompts), "latents": parts.policy.noise(generators), "num_inference_steps": 4,
        "guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 8, "output_type": "pt",
    }  # fmt: skip
    base = stock(**arguments).images
    stock.load_lora_weights(folder / f"lora{suffix}")
    theirs = stock(**arguments).images
    assert (ours.images - theirs).abs().max() < 1e-4
    assert (base - theirs).abs().max() > 1e-2


def checkpoint_noise(prompt, sample):
    from flow_grpo.randomness import keyed_generator

    return keyed_generator(0, "eval", prompt, sample)


def test_peft_loads_the_adapter(trained, random_models):
    parts, folder = trained
    base = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer", torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "lora")
    embeds = parts.policy.encode(["a bag"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = model(x, embeds.prompt_embeds, embeds.pooled_prompt_embeds, torch.tensor([300.0]), return_dict=False)[0]
    torch.testing.assert_close(theirs, parts.policy.velocity(embeds, 1.0)(x, 0.3), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_exports_a_transformer_and_resumes(config, build):
    config.use_lora, config.save_freq = False, 1
    parts = train(config, build, grpo)
    folder = find_checkpoint(str(parts.run.folder))
    exported = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    current = dict(parts.policy.transformer.named_parameters())
    assert all(torch.equal(p, current[name]) for name, p in exported.named_parameters())
    config.resume_from, config.num_epochs = str(folder), 3
    resumed = build(config)
    checkpoint.resume(resumed.policy, resumed.run, resumed.settings)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(parts), strict=True))


def test_the_latest_and_the_best_are_kept(config, build):
    config.num_checkpoint_limit = 2
    parts = build(config)
    for epoch, score in enumerate([0.1, 0.9, 0.3, None, 0.2], start=1):
        save(parts, epoch, score)
    assert names(parts) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]


def test_the_state_says_which_checkpoint_is_the_best_and_by_what(config, build, capsys):
    parts = build(config)
    for epoch, score in enumerate([0.1, 0.9, 0.3], start=1):
        save(parts, epoch, score)
    state = read_state(checkpoints(parts) / "checkpoint-000003")
    assert (state["best"], state["score"], state["score_of"]) == ("checkpoint-000002", 0.3, "eval/judge/accuracy")
    assert "checkpoint-000002 is the best so far: eval/judge/accuracy 0.9000." in capsys.readouterr().err


def test_scores_of_another_metric_are_not_compared(config, build):
    config.num_checkpoint_limit = 1
    parts = build(config)
    save(parts, 1, 0.9)
    edit_state(checkpoints(parts) / "checkpoint-000001", score_of="eval/reward/clipscore")
    for epoch, score in ((2, 0.3), (3, 0.2)):
        save(parts, epoch, score)
    assert names(parts) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_checkpoint_that_an_earlier_version_chose_by_its_training_reward_is_no_longer_kept(config, build):
    config.num_checkpoint_limit = 1
    parts = build(config)
    save(parts, 1, 0.9)
    edit_state(checkpoints(parts) / "checkpoint-000001", score_of="eval/reward/total")
    save(parts, 2)
    assert names(parts) == ["checkpoint-000002"]


def test_a_save_that_fails_leaves_the_earlier_checkpoint_whole_and_no_litter(config, build, monkeypatch, capsys):
    parts = build(config)
    assert save(parts, 1)
    state = (checkpoints(parts) / "checkpoint-000001" / "state.json").read_text()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", full_disk)
        assert not any(save(parts, epoch) for epoch in (1, 2))
    assert "checkpoint-000002 cannot be written (No space left on device)" in capsys.readouterr().err
    assert names(parts) == ["checkpoint-000001"]
    assert (checkpoints(parts) / "checkpoint-000001" / "state.json").read_text() == state
    training_state.restore(parts.policy, parts.run, training_state.read(find_checkpoint(str(parts.run.folder))), "it")


def test_weights_that_are_not_finite_are_not_saved(config, build, capsys):
    parts = build(config)
    with torch.no_grad():
        parts.policy.trainable[3][0] = float("inf")
    assert not save(parts, 1)
    name = list(parts.policy.named_trainable)[3]
    assert f"no checkpoint of epoch 1: weights.{name} is no longer finite." in capsys.readouterr().err
    assert not checkpoints(parts).exists()


def test_files_follow_the_umask(config, build):
    parts = build(config)
    before = os.umask(0o027)
    try:
        save(parts, 1)
    finally:
        os.umask(before)
    files = [path for path in (checkpoints(parts) / "checkpoint-000001").rglob("*") if path.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_checkpoint_of_other_weights_is_refused(config, build):
    parts = build(config)
    checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    folder = find_checkpoint(str(parts.run.folder))
    records = {name: (parts.run.folder / name).read_bytes() for name in ("config.json", "environment.json")}
    config.resume_from, config.lora.rank = str(folder), 2
    with pytest.raises(ConfigError, match=r"config\.lora\.rank = 2, but the checkpoint .* was made with 4"):
        build(config)
    assert all((parts.run.folder / name).read_bytes() == content for name, content in records.items())
