"""`fme check`: runs, checkpoints, LoRAs, pipelines and folders of images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub import constants
from PIL import Image

from flow_grpo.commands import check as check_command
from flow_grpo.commands.main import main
from flow_grpo.diversity.images import read_images
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators import evaluation
from flow_grpo.inspection.comparison import FilesAsTensor, draw, start
from flow_grpo.inspection.looking import Options, check_features, look_at, reward_of, set_features
from flow_grpo.inspection.things import find_out
from flow_grpo.page.data import read_runs
from flow_grpo.page.seeds import Group, differences
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards.own_files import Asked
from flow_grpo.runs.evaluations import records_of
from flow_grpo.training.checkpoint import Saver
from tests.lora_writers import Layer, keyed, kohya, random_lora, save, stock_diffusers, stock_peft
from tests.saved_runs import edit_config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def options(random_models: Path) -> list[str]:
    """Few, fast images of the random SD3."""
    return [
        *("--base", str(random_models / "sd3"), "--prompts", str(random_models / "prompts.txt"), "-n", "6"),
        *("--features", str(random_models / "judge"), "--steps", "3"),
    ]


@pytest.fixture
def lora(random_models: Path, tmp_path: Path) -> Path:
    """A folder by diffusers."""
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    return stock_diffusers(tmp_path / "colours", random_lora(transformer))


def check(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """What --json prints, and nothing besides."""
    assert main(["check", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """One sentence, and no folder of results."""
    with pytest.raises(SystemExit) as stopped:
        main(["check", *map(str, arguments)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not Path("logs").exists()
    return said


# --- LoRAs ------------------------------------------------------------------------------------------------


def test_a_lora_is_compared_with_its_base(lora, options, random_models, capsys) -> None:
    found = check(lora, *options, "--reward", f"pickscore={random_models}/clip", "--judge", random_models / "judge",
                  capsys=capsys)  # fmt: skip
    assert found["layers"] == [{"name": "colours", "loaded": 7, "of": 7, "text_encoder": 0, "unknown": []}]
    assert set(found["changes"]) == {"reward", "vendi", "reached", "judge"}
    assert (found["images"], found["prompts"], found["paired"], found["against"]) == (24, 4, True, "base model sd3")
    assert found["changes"]["reward"]["old"] != found["changes"]["reward"]["new"]
    assert Path(found["page"]).is_file()
    base, other = records_of(Path(found["out"]))
    assert (base.name, other.name, other.epoch) == ("base model sd3", "colours", 1)
    assert base.prompts == other.prompts
    assert base.noise == other.noise


def test_without_reward_and_judge_diversity_and_recall_are_left(lora, options, capsys) -> None:
    found = check(lora, *options, capsys=capsys)
    assert set(found["changes"]) == {"vendi", "reached"}
    assert found["verdicts"]["exploitation"] == "no_reward"


def test_a_lora_that_changes_nothing_changes_nothing(options, random_models, tmp_path, capsys) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    zero = {name: Layer(layer.a, 0 * layer.b, 4.0) for name, layer in random_lora(transformer).items()}
    found = check(kohya(tmp_path, zero), *options, capsys=capsys)
    assert found["changes"]["vendi"]["difference"] == 0
    assert found["verdicts"]["diversity"] == "not_shown"


def test_the_words_name_layers_figures_verdicts_and_the_page(lora, options, capsys) -> None:
    assert main(["check", str(lora), *options]) == 0
    said = capsys.readouterr().out
    for words in ("colours: 7 of 7 layers loaded", "Different images of 6", "not measured  (--judge MODEL)", "page: "):
        assert words in said


def test_results_are_never_overwritten(lora, options, capsys) -> None:
    first, second = (check(lora, *options, capsys=capsys)["out"] for _ in range(2))
    assert (first, second) == ("logs/check/colours", "logs/check/colours-2")
    assert "is not empty" in refusal_of_out(lora, options, first, capsys)


def refusal_of_out(lora, options, out, capsys) -> str:
    with pytest.raises(SystemExit):
        main(["check", str(lora), *options, "--out", out])
    return capsys.readouterr().err


def test_a_peft_folder_knows_its_base(random_models, tmp_path) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    folder = stock_peft(tmp_path / "adapter", transformer, random_lora(transformer))
    settings = json.loads((folder / "adapter_config.json").read_text())
    for named in (random_models / "sd3", random_models / "sd3" / "transformer"):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(named)}))
        look = look_at(find_out(str(folder)), None, Options())
        assert look.config.pretrained.model == str(random_models / "sd3")


def test_the_embedded_sd3_is_the_default_base(tmp_path, random_models) -> None:
    tiny = SD3Transformer2DModel.from_pretrained(find_out("assets/tiny_sd3").path / "transformer")
    look = look_at(find_out(str(kohya(tmp_path, random_lora(tiny)))), None, Options())
    assert (look.config.pretrained.model, look.config.resolution, look.config.eval.num_steps) == (
        "assets/tiny_sd3",
        32,
        10,
    )


@pytest.mark.parametrize(("pipeline", "tokens"), [("assets/tiny_sd3", 8), ("assets/tiny_scenes", 12)])
def test_prompts_of_a_small_pipeline_are_as_long_as_its_tokenizer_takes(pipeline, tokens) -> None:
    """ "an orange t-shirt and a purple sneaker" is longer than a prompt of the tiny SD3."""
    assert look_at(find_out(pipeline), None, Options()).config.max_sequence_length == tokens


def test_another_models_lora_is_refused_before_anything_loads(tmp_path, options, capsys, monkeypatch) -> None:
    monkeypatch.setattr("flow_grpo.commands.check._compare", lambda *_: pytest.fail("a model was loaded"))
    wrong = {"transformer_blocks.0.attn.to_q": Layer(torch.zeros(4, 1536), torch.zeros(1536, 4), 4.0)}
    path = save(tmp_path, keyed(wrong, lambda name, matrix: f"transformer.{name}.{matrix}.weight"))
    said = refusal(path, *options, capsys=capsys)
    assert "(4, 1536)" in said
    assert "--base names another" in said


# --- runs and checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def trained(config, build):
    """A run with a checkpoint of weights that were changed."""

    def make(**changes):
        config.update_from_flattened_dict(changes)
        parts = build(config)
        with torch.no_grad():
            for number, parameter in enumerate(parts.policy.trainable):
                draw = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        parts.run.counters.epoch = 1
        Saver(parts.policy, parts.run, parts.settings).save(None)
        return parts

    return make


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_checkpoints_images_are_those_of_the_runs_own_evaluation(trained, use_lora) -> None:
    parts = trained(use_lora=use_lora)
    request = evaluation.test_request(parts.prompts, parts.settings)
    expected = evaluation.draw_samples(parts.policy, parts.prompts, parts.settings, parts.run, [request]).images
    look = look_at(find_out(str(parts.run.folder)), None, Options(images=5))
    settings, accelerator = start(look)
    base, other = (drawn.samples.images for drawn in draw(look.models, settings, accelerator, parts.prompts, request))
    assert torch.equal(other, expected)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_a_run_is_looked_at_by_its_own_settings(trained, capsys) -> None:
    parts = trained()
    parts.run.finish()
    found = check(parts.run.folder, "-n", "6", capsys=capsys)
    assert (found["kind"], found["name"]) == ("run", "run-checkpoint-000001")
    assert set(found["changes"]) == {"reward", "vendi", "reached", "judge"}
    same = check(parts.run.folder / "checkpoints" / "checkpoint-000001", "-n", "6", capsys=capsys)
    assert same["changes"] == found["changes"]


def test_a_run_with_an_unknown_reward_is_looked_at_without_it(trained, capsys) -> None:
    parts = trained()
    edit_config(parts.run.folder, **{"reward_fn.mine": 1.0})
    look = look_at(find_out(str(parts.run.folder)), None, Options())
    assert not look.rewarded
    assert "the run's reward 'mine' is not known here" in capsys.readouterr().err


def test_averaged_weights_that_are_not_there(trained, capsys) -> None:
    parts = trained(**{"train.ema": False})
    assert "has no lora_ema/" in refusal(parts.run.folder, "--ema", capsys=capsys)


def test_a_damaged_checkpoint_is_refused(trained, capsys) -> None:
    parts = trained()
    path = parts.run.folder / "checkpoints" / "checkpoint-000001" / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "damaged" in refusal(parts.run.folder, capsys=capsys)


# --- pipelines ----------------------------------------------------------------------------------------------


def test_a_pipeline_alone_and_with_a_lora(lora, options, random_models, capsys) -> None:
    alone = check(random_models / "sd3", *options[2:], capsys=capsys)
    assert alone["changes"] == {}
    assert alone["vendi"]["low"] <= alone["vendi"]["estimate"] <= alone["vendi"]["high"]
    both = check(random_models / "sd3", "--lora", lora, *options[2:], capsys=capsys)
    assert (both["name"], both["layers"][0]["loaded"]) == ("sd3 + colours", 7)
    assert both["changes"]["vendi"]["old"] == pytest.approx(alone["vendi"]["estimate"], rel=1e-6)


def test_two_loras_against_each_other(lora, options, random_models, tmp_path, capsys) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    other = kohya(tmp_path, random_lora(transformer))
    found = check(other, "--against", lora, *options, capsys=capsys)
    assert found["changes"]["vendi"]["difference"] == pytest.approx(0, abs=1e-4)  # the same LoRA, written twice


def test_a_model_is_not_compared_with_itself(lora, options, capsys) -> None:
    assert "is compared with itself" in refusal(lora, *options, "--against", lora, capsys=capsys)


# --- images -------------------------------------------------------------------------------------------------


def write_folder(folder: Path, spread: float, counts: tuple[int, ...] = (8, 8), start: int = 0, side: int = 32) -> Path:
    """Noise about one picture; a sub-folder for each prompt."""
    for p, count in enumerate(counts):
        (folder / f"prompt {p}").mkdir(parents=True)
        draw = np.random.default_rng([p, start])
        picture = np.random.default_rng(p).uniform(60, 190, (side, side, 3))
        for i in range(count):
            noisy = picture + spread * draw.standard_normal((side, side, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"prompt {p}" / f"{start + i}.png")
    return folder


def test_folders_of_the_same_names_are_paired_and_others_independent(tmp_path, capsys) -> None:
    base = write_folder(tmp_path / "base", 60)
    found = check(write_folder(tmp_path / "same", 2), "--against", base, capsys=capsys)
    assert found["paired"]
    assert found["changes"]["vendi"]["paired"]
    assert found["verdicts"]["diversity"] == "less"
    found = check(write_folder(tmp_path / "other", 2, start=50), "--against", base, capsys=capsys)
    assert not found["paired"]
    assert not found["changes"]["vendi"]["paired"]


def test_the_page_of_independent_folders_calls_nothing_paired(tmp_path, capsys) -> None:
    base = write_folder(tmp_path / "base", 60)
    found = check(write_folder(tmp_path / "other", 2, start=50), "--against", base, capsys=capsys)
    shown = re.sub(r"<(script|style)>.*?</\1>", "", Path(found["page"]).read_text(), flags=re.DOTALL)
    shown = re.sub(r'"paired": ?false', "", shown)
    assert [words for words in re.split("[.:]", shown) if "paired" in words] == [" no difference is paired"]
    assert "same noise" not in shown.lower()
    assert "was trained on" not in shown
    found = check(write_folder(tmp_path / "same", 2), "--against", base, capsys=capsys)  # the broken twin
    assert "every difference is paired" in Path(found["page"]).read_text()


def test_results_of_other_folders_are_not_compared_image_by_image(tmp_path, capsys) -> None:
    """`fme view` of both pages' folders: images of one number in two folders have nothing in common."""
    base, folders = write_folder(tmp_path / "base", 60), [write_folder(tmp_path / name, 2) for name in ("a", "b")]
    found = [check(folder, "--against", base, capsys=capsys) for folder in folders]
    runs = read_runs([Path(one["out"]) for one in found])
    compared = differences(Group("b", (1,)), Group("a", (0,)), runs)
    assert {figure.how for figure in compared.values()} == {"none"}


def test_of_folders_of_different_sizes_as_many_images_are_compared(tmp_path, capsys) -> None:
    base = write_folder(tmp_path / "base", 60, (9, 8))
    found = check(write_folder(tmp_path / "other", 60, (6, 8), start=50), "--against", base, capsys=capsys)
    assert found["images"] == 14
    assert found["changes"]["vendi"]["images"] == 14


def test_one_folder_has_its_own_score(tmp_path, capsys) -> None:
    found = check(write_folder(tmp_path / "base", 60, (8,)) / "prompt 0", capsys=capsys)
    assert found["against"] is None
    assert 1 <= found["vendi"]["estimate"] <= 8
    page = Path(found["page"]).read_text()
    assert (
        json.loads(page.partition('id="data">')[2].partition("</script>")[0])["runs"][0]["evaluations"][0]["diversity"]
        == "alone"
    )
    assert main(["check", str(tmp_path / "base")]) == 0
    assert "Different images of 8" in capsys.readouterr().out


def test_a_reward_and_a_judge_take_the_folders_names_as_prompts(tmp_path, capsys) -> None:
    base = write_folder(tmp_path / "base", 60)
    more = ["--reward", "jpeg_compressibility", "--judge", "assets/tiny_features"]
    found = check(write_folder(tmp_path / "same", 2), "--against", base, *more, capsys=capsys)
    assert set(found["changes"]) == {"reward", "vendi", "reached", "judge"}
    assert "needs a folder of images for each prompt" in refusal_for_flat(base / "prompt 0", more, capsys)


def refusal_for_flat(folder, more, capsys) -> str:
    with pytest.raises(SystemExit):
        main(["check", str(folder), *more])
    return capsys.readouterr().err


def test_tiny_features_of_large_images_are_refused_with_what_to_type(tmp_path, capsys) -> None:
    folder = write_folder(tmp_path / "base", 60, (4,), side=65)
    said = refusal(folder, capsys=capsys)
    assert "--features openai/clip-vit-large-patch14" in said
    assert "dinov2:facebook/dinov2-large" in said


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("a", (8, 8, 8)), "hold different prompts: 'prompt 2'"),
        (("a", (3, 8)), "an interval takes at least 5"),
    ],
)
def test_folders_that_cannot_be_compared(tmp_path, capsys, other, said) -> None:
    base = write_folder(tmp_path / "base", 60)
    assert said in refusal(write_folder(tmp_path / other[0], 60, other[1]), "--against", base, capsys=capsys)


def test_images_are_read_when_they_are_asked_for(tmp_path) -> None:
    folder = read_images(write_folder(tmp_path / "base", 60))
    paths = [path for group in folder.groups.values() for path in group]
    lazy = FilesAsTensor(paths, folder.size)
    whole = torch.cat([folder.pixels(group) for group in folder.groups])
    assert lazy.shape == tuple(whole.shape)
    assert torch.equal(lazy[3], whole[3])
    assert torch.equal(lazy[2:5], whole[2:5])
    assert torch.equal(lazy[[1, 7]], whole[[1, 7]])


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "3"], "a whole number of at least 5"),
        (["--guidance", "nan"], "a number of at least 0"),
        (["--steps", "0"], "a whole number of at least 1"),
        (["--reward", "beauty"], "--reward beauty is not allowed; it takes"),
        (["--reward", "pikscore"], "--reward pikscore is not allowed; did you mean pickscore? It takes"),
        (["--prompts", "nowhere.txt"], "does not exist"),
        (["--judge", "assets/nowhere"], "assets/nowhere"),
        (["--features", "dinov2:"], "names no model"),
        (["--base", "assets/prompts"], "assets/prompts holds nothing"),
        (["--lora", "assets/tiny_sd3"], "is no LoRA"),
        (["--against", "nothing"], "does not exist"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options_are_one_sentence(lora, options, capsys, arguments, said) -> None:
    assert said in refusal(lora, *options, *arguments, capsys=capsys)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--features", "./nowhere", "--features './nowhere' is not a directory"),
        ("--judge", "./nowhere", "--judge './nowhere' is not a directory"),
        ("--reward", "pickscore=./nowhere", "--reward pickscore=./nowhere is not a directory"),
        ("--reward", "jpeg_compressibility=here", "--reward jpeg_compressibility=here: it has no model"),
        ("--size", "33", "--size 33 does not fit"),
    ],
)
def test_a_mistake_in_a_setting_is_told_of_its_option(lora, options, capsys, flag, value, said) -> None:
    assert said in refusal(lora, *options, flag, value, capsys=capsys)


def test_what_is_neither_here_nor_on_the_hub(capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "'nobody/nothing' is no folder here, is not in the hub's cache, and cannot be fetched" in refusal(
        "nobody/nothing", capsys=capsys
    )


@pytest.mark.parametrize("out", ["", "made/for/it"])
def test_a_check_that_fails_midway_leaves_nothing(lora, options, capsys, monkeypatch, out) -> None:
    def fail(*_: object, **__: object) -> None:
        assert any(Path("made" if out else "logs").rglob("eval_*.json"))
        raise ConfigError("no page today.")

    monkeypatch.setattr(check_command, "build_page", fail)
    assert "no page today" in refusal(lora, *options, *(("--out", out) if out else ()), capsys=capsys)
    assert not any(Path().iterdir())


def test_a_folder_that_was_there_stays_after_a_failure(lora, options, capsys, monkeypatch) -> None:
    Path("mine").mkdir()
    monkeypatch.setattr(check_command, "build_page", lambda *_, **__: Path("/no/such/file").read_text())
    assert "cannot be read or written" in refusal(lora, *options, "--out", "mine", capsys=capsys)
    assert not any(Path("mine").iterdir())


def test_images_are_not_compared_with_a_model(lora, tmp_path, capsys) -> None:
    assert "images and a model" in refusal(lora, "--against", write_folder(tmp_path / "a", 60), capsys=capsys)


@pytest.mark.parametrize(
    ("text", "kind", "model", "pretrained"),
    [
        ("openai/clip-vit-large-patch14", "clip", "openai/clip-vit-large-patch14", ""),
        ("dinov2:facebook/dinov2-large", "dinov2", "facebook/dinov2-large", ""),
        ("open_clip:ViT-B-32:laion2b", "open_clip", "ViT-B-32", "laion2b"),
        ("open_clip:hf-hub:org/name", "open_clip", "hf-hub:org/name", ""),
    ],
)
def test_features_are_named_with_their_kind(text, kind, model, pretrained) -> None:
    config = get_config()
    set_features(config, text)
    assert (config.diversity.extractor, config.diversity.model, config.diversity.pretrained) == (
        kind,
        model,
        pretrained,
    )


def test_tiny_features_are_known_by_what_they_see(random_models) -> None:
    config = get_config()
    check_features(config, 64)
    config.diversity.model = str(random_models / "judge")
    with pytest.raises(ValueError, match="see 32 x 32 pixels, and these images have 65"):
        check_features(config, 65)


def test_a_rewards_model_depends_on_the_images_size() -> None:
    assert reward_of("pickscore", 32) == Asked("pickscore", "assets/tiny_pickscore")
    assert reward_of("pickscore", 1024) == Asked("pickscore", "yuvalkirstain/PickScore_v1")
    assert reward_of("pickscore=here", 32) == Asked("pickscore", "here")
    assert reward_of("hpsv2=here", 32) == Asked("hpsv2", "here")
    assert reward_of("hpsv2", 32) == Asked("hpsv2")  # its own default
    assert reward_of("jpeg_compressibility", 32) == Asked("jpeg_compressibility")
