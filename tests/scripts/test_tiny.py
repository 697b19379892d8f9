"""The embedded models: how they are made, and that the committed ones are as good as their cards say."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPProcessor

from flow_grpo.errors import ConfigError
from flow_grpo.randomness import sample_generators
from flow_grpo.rewards.clip import ClipScorer
from scripts.tiny import data as tiny_data
from scripts.tiny import measure as measure_tiny
from scripts.tiny import models as tiny_models
from scripts.tiny import pretrain as pretrain_tiny
from scripts.tiny import training as train_tiny
from scripts.tiny.fit import Fit, Recipe

ASSETS = Path(__file__).parents[2] / "assets"
SMALL = Recipe(steps=5, batch=4, learning_rate=1e-3, warmup=2, ema_decay=0.9)


@pytest.fixture
def photographs() -> tiny_data.Photographs:
    """Twelve bright squares of different sizes on black."""
    grey = torch.zeros(12, 32, 32, dtype=torch.uint8)
    for index in range(12):
        grey[index, 10 - index // 2 : 20 + index // 2, 8:24] = 120 + 10 * index
    return tiny_data.Photographs(grey, torch.arange(12) % 10)


# --- data -------------------------------------------------------------------------------------------------


def test_tint_shows_the_colour_and_leaves_the_background_white(photographs):
    colours = torch.arange(12) % 8
    images = tiny_data.tint(photographs.grey, colours)
    garment = photographs.grey > 0
    assert (images.permute(0, 2, 3, 1)[~garment] == 1).all()
    means = torch.stack([image[:, mask].mean(1) for image, mask in zip(images, garment, strict=True)])  # (12, 3)
    hues = F.normalize(means, dim=1) @ F.normalize(tiny_data.PALETTE, dim=1).T
    assert torch.equal(hues.argmax(1), colours)
    shade = 0.35 + 0.75 * 120 / 255  # of the first photograph, whose garment is 120 throughout
    torch.testing.assert_close(means[0], torch.tensor([220.0, 40.0, 40.0]) / 255 * shade)


def test_tint_keeps_the_order_of_grey_values(photographs):
    ramp = torch.arange(43, 256, dtype=torch.uint8).expand(32, -1)[:, :32][None]
    image = tiny_data.tint(ramp, torch.tensor([0]))[0]
    assert (image.diff(dim=-1) >= 0).all()


def test_captions_read_as_english_and_their_ids_point_at_them():
    captions = tiny_data.all_captions()
    assert len(captions) == len(set(captions)) == 91
    assert tiny_data.caption(7) == "a sneaker"
    assert tiny_data.caption(7, 0) == "a red sneaker"
    assert tiny_data.caption(7, 5) == "an orange sneaker"
    labels, colours = torch.tensor([7, 7, 9]), torch.tensor([0, 5, 7])
    ids = tiny_data.caption_ids(labels, colours, torch.tensor([True, True, False]))
    assert [captions[i] for i in ids] == ["a red sneaker", "an orange sneaker", "a boot"]


def test_every_plain_prompt_has_its_eight_modes(tmp_path):
    tiny_data.write_prompts(tmp_path)
    modes = json.loads((tmp_path / "modes.json").read_text())
    for name in ("train", "test", "eval_diversity"):
        assert (tmp_path / f"{name}.txt").read_text().splitlines() == list(modes)
    assert modes["a boot"]["gray"] == "a gray boot"
    assert [prompt for colours in modes.values() for prompt in colours.values()] == tiny_data.coloured_captions()


def test_missing_data_are_one_sentence_that_names_package_and_flag(tmp_path, capsys):
    arguments = ["--stage", "vae", "--data", str(tmp_path / "nowhere"), "--work", str(tmp_path)]
    assert pretrain_tiny.main(arguments) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "dataset-fashion-mnist" in sentence
    assert "--data" in sentence
    assert str(tmp_path / "nowhere") in sentence


def test_sd3_without_an_autoencoder_is_refused(tmp_path, capsys, monkeypatch, photographs):
    monkeypatch.setattr(tiny_data, "load", lambda split, folder: photographs)
    assert pretrain_tiny.main(["--stage", "sd3", "--work", str(tmp_path)]) == 2
    assert "--stage vae" in capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------------------


def test_a_saved_pipeline_tokenizes_and_draws_as_before(tmp_path):
    pipeline = tiny_models.build_pipeline(seed=3)
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    texts = [*tiny_data.all_captions(), "a photo of a QUIRKY dress, 3d!"]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        before, after = getattr(pipeline, name), getattr(loaded, name)
        assert before.model_max_length == after.model_max_length == tiny_models.PROMPT_LENGTH
        assert before(texts).input_ids == after(texts).input_ids
    images = [draw(each, ["a red sneaker", ""], steps=2, guidance=2.0) for each in (pipeline, loaded)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)  # the weights lie elsewhere in memory: rounding differs


def test_no_caption_is_cut_and_no_two_share_their_tokens():
    pipeline = tiny_models.build_pipeline()
    captions = tiny_data.all_captions()
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        ids = tokenizer(captions).input_ids
        assert max(map(len, ids)) <= tiny_models.PROMPT_LENGTH
        assert len(set(map(tuple, ids))) == len(captions)


def test_every_build_of_a_tokenizer_is_the_same():
    captions = tiny_data.all_captions()
    first, second = (tiny_models.build_clip_tokenizer(captions) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert [first.tokenize(word) for word in ("sneaker", "QUIRKY")] == [
        ["sneaker</w>"],
        ["q", "u", "i", "r", "k", "y</w>"],
    ]


def test_merges_of_a_corpus_worked_by_hand():
    """ "ab" occurs 3 times and "bc" once; of the ties that follow the last in the alphabet goes first."""
    merges = tiny_models.learn_merges(Counter({"abx": 2, "abc": 1}))
    assert merges == [("a", "b"), ("ab", "x</w>"), ("ab", "c</w>")]


def test_the_seed_alone_decides_the_random_weights():
    state = torch.get_rng_state()
    same, again, other = (tiny_models.build_clip(seed)[0].state_dict() for seed in (1, 1, 2))
    key = "visual_projection.weight"
    assert torch.equal(same[key], again[key])
    assert not torch.equal(same[key], other[key])
    assert torch.equal(state, torch.get_rng_state())


def test_a_saved_clip_reads_texts_and_pictures_as_before(tmp_path, photographs):
    model, processor = tiny_models.build_clip(seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, processor_2 = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    pictures = [image.numpy() for image in (255 * tiny_data.tint(photographs.grey, torch.arange(12) % 8)).byte()]
    logits = []
    for clip, reader in ((model, processor), (loaded, processor_2)):
        inputs = reader(text=tiny_data.plain_captions(), images=pictures, padding=True, return_tensors="pt")
        logits.append(clip(**inputs).logits_per_image)
    assert logits[0].shape == (12, 10)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for the signal that ends a run."""


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Make the function of train_tiny that draws a batch end the run at its n-th call."""
    genuine, calls = getattr(train_tiny, name), []

    def draw_or_die(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KilledError
        return genuine(*arguments)

    monkeypatch.setattr(train_tiny, name, draw_or_die)


def weights(module: torch.nn.Module) -> torch.Tensor:
    """All weights of a module in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_killed_autoencoder_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, photographs):
    recipe = replace(SMALL, ema_decay=0.0)
    unbroken = train_tiny.train_vae(photographs, recipe, 0, tmp_path / "a", save_every=2)
    with monkeypatch.context() as patch:
        kill_at(patch, "draw", call=4)
        with pytest.raises(KilledError):
            train_tiny.train_vae(photographs, recipe, 0, tmp_path / "b", save_every=2)
    resumed = train_tiny.train_vae(photographs, recipe, 0, tmp_path / "b", save_every=2)
    assert torch.equal(weights(unbroken), weights(resumed))
    assert unbroken.config.scaling_factor == resumed.config.scaling_factor
    other = train_tiny.train_vae(photographs, recipe, 1, tmp_path / "c", save_every=2)
    assert not torch.equal(weights(unbroken), weights(other))


def test_a_killed_sd3_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, photographs):
    vae = tiny_models.build_vae().eval()

    def train(work: str) -> torch.Tensor:
        pipeline = train_tiny.train_sd3(photographs, vae, SMALL, 0, tmp_path / work, save_every=2)
        return torch.cat([weights(pipeline.transformer), weights(pipeline.text_encoder_3)])

    start = tiny_models.build_pipeline(0)
    unbroken = train("a")
    with monkeypatch.context() as patch:
        kill_at(patch, "draw_latents", call=4)
        with pytest.raises(KilledError):
            train("b")
    assert torch.equal(unbroken, train("b"))
    assert not torch.equal(unbroken, torch.cat([weights(start.transformer), weights(start.text_encoder_3)]))


def test_noise_from_the_global_generator_would_break_resuming(tmp_path):
    """The broken twin of the two tests above: the same loop, its loss drawing in call order."""

    def train(work: str, stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        drawn = []

        def loss(generator: torch.Generator) -> torch.Tensor:
            drawn.append(1)
            if len(drawn) == stop:
                raise KilledError
            return model(torch.randn(8, 3)).square().mean()

        Fit("linear", [model], SMALL, 0, tmp_path / work).run(loss, save_every=2)
        return weights(model)

    unbroken = train("a", stop=None)
    with pytest.raises(KilledError):
        train("b", stop=4)
    assert not torch.equal(unbroken, train("b", stop=None))


def test_a_state_of_another_recipe_is_refused(tmp_path):
    model = torch.nn.Linear(3, 1)
    Fit("linear", [model], SMALL, 0, tmp_path).save()
    with pytest.raises(ConfigError, match="another recipe"):
        Fit("linear", [model], replace(SMALL, batch=5), 0, tmp_path).restore()


def test_an_sd3_state_is_not_continued_around_another_autoencoder(tmp_path, photographs):
    vae = tiny_models.build_vae().eval()
    recipe = replace(SMALL, steps=1)
    train_tiny.train_sd3(photographs, vae, recipe, 0, tmp_path, save_every=1)
    train_tiny.train_sd3(photographs, vae, recipe, 0, tmp_path, save_every=1)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-3
    with pytest.raises(ConfigError, match="ingredient"):
        train_tiny.train_sd3(photographs, vae, recipe, 0, tmp_path, save_every=1)


def test_a_state_made_with_another_constant_is_refused(tmp_path, monkeypatch, photographs):
    recipe = replace(SMALL, steps=1)

    def train() -> None:
        train_tiny.train_vae(photographs, recipe, 0, tmp_path, save_every=1)

    def train_judge() -> None:
        train_tiny.train_clip("features", photographs, recipe, 0, tmp_path, save_every=1)

    train()
    train_judge()
    monkeypatch.setattr(train_tiny, "VAE_KL_WEIGHT", 1e-3)
    monkeypatch.setitem(train_tiny.CLIP_SIZES, "features", {})
    for again in (train, train_judge):
        with pytest.raises(ConfigError, match="ingredient"):
            again()


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    recipe = Recipe(steps=1000, batch=1, learning_rate=1.0, warmup=100, flat=0.5)
    assert recipe.rate(0) == pytest.approx(0.01)
    assert recipe.rate(99) == recipe.rate(500) == 1.0
    assert recipe.rate(750) == pytest.approx(0.5)
    assert recipe.rate(1000) == pytest.approx(0.0)


def test_contrastive_loss_is_clips_own_where_all_captions_differ():
    image, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    scale, ids = torch.tensor(1.3), torch.arange(6)
    logits = scale.exp() * image @ text.T
    expected = (F.cross_entropy(logits, ids) + F.cross_entropy(logits.T, ids)) / 2
    torch.testing.assert_close(train_tiny.contrastive_loss(image, text, ids, scale), expected)


def test_contrastive_loss_keeps_images_of_one_caption_together():
    """Two captions, twice each: fitted exactly, log(2) is left. Its twin, all pairs negatives, wants them apart."""
    ids, scale = torch.tensor([0, 0, 1, 1]), torch.tensor(4.0)
    together = torch.eye(2)[ids]
    apart = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]]), dim=-1)

    def loss(features: torch.Tensor, caption_ids: torch.Tensor) -> float:
        return train_tiny.contrastive_loss(features, features, caption_ids, scale).item()

    assert loss(together, ids) == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert loss(apart, ids) > loss(together, ids)
    assert loss(apart, torch.arange(4)) < loss(together, torch.arange(4))


# --- measures ---------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    images = torch.full((2, 3, 4, 4), 0.5)
    assert measure_tiny.psnr(images, images + 0.1) == pytest.approx(20, abs=1e-4)


def test_measuring_what_is_not_there_is_one_sentence(tmp_path, capsys):
    assert measure_tiny.main(["--out", str(tmp_path)]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "scripts/tiny/pretrain.py" in sentence


# --- the committed models -----------------------------------------------------------------------------------


def draw(pipeline: StableDiffusion3Pipeline, prompts: list[str], steps: int, guidance: float) -> torch.Tensor:
    """One picture for each prompt, (B, 3, 32, 32) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=32,
        width=32,
        max_sequence_length=tiny_models.PROMPT_LENGTH,
        output_type="pt",
        generator=sample_generators(0, "test", 0, torch.arange(len(prompts))),
    ).images


def metrics(name: str) -> dict:
    """The committed figures of one model."""
    return json.loads((ASSETS / name / "metrics.json").read_text())


def test_all_committed_weights_take_at_most_12_megabytes():
    sizes = [path.stat().st_size for name in STAGES for path in (ASSETS / name).rglob("*.safetensors")]
    assert len(sizes) == 7
    assert sum(sizes) <= 12e6


STAGES = {"tiny_sd3": ("vae", "sd3"), "tiny_pickscore": ("pickscore",), "tiny_features": ("features",)}


@pytest.mark.parametrize("name", STAGES)
def test_every_committed_model_was_made_with_the_recipe_of_today(name):
    training = json.loads((ASSETS / name / "training.json").read_text())
    assert training == {"seed": 0, **{stage: asdict(train_tiny.RECIPES[stage]) for stage in STAGES[name]}}
    assert metrics(name)["training"] == training


@pytest.mark.parametrize("name", STAGES)
def test_the_figures_are_those_of_the_committed_weights(name):
    figures = metrics(name)
    sha256 = {
        path.relative_to(ASSETS / name).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (ASSETS / name).rglob("*.safetensors")
    }
    assert figures["sha256"] == sha256
    for key, value in measure_tiny.weights(ASSETS / name).items():
        assert figures[key] == value


@pytest.mark.parametrize("name", STAGES)
def test_every_card_is_made_from_its_figures(name, tmp_path):
    (tmp_path / name).mkdir()
    measure_tiny.write_card(tmp_path / name, metrics(name))
    assert (tmp_path / name / "README.md").read_text() == (ASSETS / name / "README.md").read_text()


def test_reward_and_judge_know_the_held_out_photographs():
    for name in ("tiny_pickscore", "tiny_features"):
        test = metrics(name)["test"]
        assert test["images"] == 10_000
        assert test["class_accuracy"] >= 0.84


def test_the_pipeline_meets_its_specification():
    figures = metrics("tiny_sd3")
    quality, diversity = figures["quality"], figures["diversity"]
    assert quality["images"] == diversity["images"] == 1000
    assert quality["steps"] == diversity["steps"] == 20
    assert quality["plain_class_accuracy"] >= 0.85
    assert quality["coloured_colour_accuracy"] >= 0.95
    assert diversity["guidance"] == 1.0
    assert all(0.04 <= share <= 0.25 for share in diversity["colour_shares"].values())
    assert diversity["vendi_ratio"] == pytest.approx(1, abs=0.1)
    assert figures["autoencoder"]["psnr_db"] >= 28


def test_the_committed_pipeline_draws_what_it_is_asked_for():
    pipeline = measure_tiny.load_pipeline(ASSETS / "tiny_sd3")
    judge = ClipScorer(str(ASSETS / "tiny_features"))
    images = draw(pipeline, tiny_data.coloured_captions(), steps=10, guidance=measure_tiny.GUIDANCE)
    labels, colours = torch.arange(80) // 8, torch.arange(80) % 8
    image = measure_tiny.features(judge, images)
    assert (measure_tiny.nearest_colours(judge, image, labels) == colours).float().mean() >= 0.9
    assert measure_tiny.class_right(judge, image, labels) >= 0.7
    assert measure_tiny.psnr(measure_tiny.reconstruct(pipeline.vae, images), images) >= 28


def test_an_untrained_autoencoder_would_fail_the_spot_check():
    vae: AutoencoderKL = tiny_models.build_vae().eval()
    images = tiny_data.tint(torch.zeros(2, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))
    assert measure_tiny.psnr(measure_tiny.reconstruct(vae, images), images) < 28
