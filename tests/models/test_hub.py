"""Models of the hub are checked as folders are, by their small files, before anything large is fetched."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from huggingface_hub import constants
from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.inspection.looking import Options, look_at
from flow_grpo.inspection.things import find_out
from flow_grpo.launch import _check_pipeline
from flow_grpo.models import hub as cache
from flow_grpo.models.loading import check_prompt_length, class_of, load_model
from flow_grpo.models.pipeline_files import check_pipeline, expected_family, whole_folder
from flow_grpo.models.registry import FAMILIES
from flow_grpo.runs.digest import base_digest
from flow_grpo.settings import Settings, resolve
from tests.models.fake_hub import commit_of, fake_hub
from tests.models.families import CASES
from tests.models.test_files import change

LARGE = (".safetensors", "vocab.json", "merges.txt", "tokenizer.json", "spiece.model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub(tmp_path / "cache", monkeypatch) as served:
        yield served


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """The folder of a tiny pipeline of each family."""
    folder = tmp_path_factory.mktemp("pipelines")
    for case in CASES:
        case.build().save_pretrained(folder / case.name)
    return folder


def served(config: ConfigDict, **changes) -> Settings:
    """The settings of a run that takes org/model."""
    config.pretrained.model = "org/model"
    config.update_from_flattened_dict(changes)
    return resolve(config, 1, False, fetch=True)


def refusal(config: ConfigDict, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        served(config, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is fetched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_family_and_all_that_follows_from_it_are_known_once_small_files_are_here(config, hub, pipelines, case):
    hub.add("org/model", pipelines / case.name)
    settings = served(config)
    family = FAMILIES[type(case.build()).__name__]
    assert expected_family("org/model") is family
    assert set(settings.config.lora.target_modules) == set(family.lora_targets)
    assert not [file for file in hub.given if file.endswith(LARGE)]
    _check_pipeline(settings)  # with torch, and the tokenizer where a chat template has a say


def test_it_is_not_asked_for_again_where_it_is_whole(config, hub, pipelines):
    hub.add("org/model", pipelines / "sd3")
    load_model(served(config).config.pretrained, "no")
    hub.asked.clear()
    served(config)
    assert hub.asked == []


def test_a_commit_in_the_cache_whose_weights_are_not_is_asked_for(config, hub, pipelines, monkeypatch):
    hub.add("org/model", pipelines / "sd3")
    served(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(config)


def test_a_revision_is_told_from_others(config, hub, pipelines):
    hub.add("org/model", pipelines / "sd3")
    hub.add("org/model", pipelines / "flux", "other")
    served(config)
    assert expected_family("org/model").pipeline == "StableDiffusion3Pipeline"
    served(config, **{"pretrained.revision": "other", "lora.target_modules": ()})
    assert expected_family("org/model", "other").pipeline == "FluxPipeline"
    assert cache.folder_of("org/model", "other").name == commit_of("org/model", "other")
    assert "no revision 'none' of it" in refusal(config, **{"pretrained.revision": "none"})


# --- what is refused -------------------------------------------------------------------------------------


def test_a_pipeline_of_no_family_is_refused_by_its_index_alone(config, hub, tmp_path):
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit/model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    hub.add("org/model", tmp_path / "edit")
    assert "'org/model' is a FluxKontextPipeline; it takes " in refusal(config)
    assert hub.given == {"model_index.json"}


BROKEN = [
    ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}, {}, '"invert_sigmas": True'),
    ("sd3", "vae/config.json", {"shift_factor": None}, {}, "org/model/vae/config.json says"),
    ("sd3", "transformer/config.json", {"pos_embed_max_size": 2}, {}, "at most 16"),
    ("sd3", "vae/config.json", {}, {"resolution": 36}, "multiple of 8"),
    ("flux2_klein", "model_index.json", {"is_distilled": True}, {"sample.guidance_scale": 4.0}, "which is distilled"),
    ("flux2_klein", "vae/config.json", {}, {"pretrained.distilled_guidance": 2.5}, "is no input of org/model"),
    ("flux", "transformer/config.json", {"guidance_embeds": False}, {"pretrained.distilled_guidance": 3.0}, "no input"),
]


@pytest.mark.parametrize(("family", "file", "values", "changes", "said"), BROKEN)
def test_what_a_folder_is_refused_for_a_hub_id_is(
    config, hub, pipelines, tmp_path, family, file, values, changes, said
):
    folder = Path(shutil.copytree(pipelines / family, tmp_path / "model"))
    hub.add("org/model", folder)
    change(folder / file, **values)
    text = refusal(config, **changes)
    assert said in text
    assert str(tmp_path / "cache") not in text
    assert not [given for given in hub.given if given.endswith(LARGE)]


@pytest.mark.parametrize("key", ["reward_model.pickscore", "eval.judge", "diversity.model", "shaping.model"])
def test_other_models_that_the_hub_lacks_are_named_by_their_keys(config, hub, key):
    changes = {key: "org/none", "eval_diversity": True}
    if key == "shaping.model":
        changes |= {"shaping.kind": "vendi", "shaping.weight": 1.0, "shaping.extractor": "clip",
                    "sample.num_image_per_prompt": 4}  # fmt: skip
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=rf"config\.{key} = 'org/none' is no folder .* the hub has no such model"):
        resolve(config, 1, False, fetch=True)


def test_a_look_at_a_model_that_is_not_there_is_refused_too(hub):
    with pytest.raises(ConfigError, match=r"'org/none' is no folder here.* no such model"):
        look_at(find_out("org/none"), None, Options(measured=False))


def test_a_look_at_a_model_of_the_hub_draws_as_its_folder_is_drawn(hub, pipelines):
    hub.add("org/model", pipelines / "sd3")
    there, here = (look_at(find_out(text), None, Options(measured=False)).config
                   for text in ("org/model", str(pipelines / "sd3")))  # fmt: skip
    with there.unlocked():
        there.pretrained.model = here.pretrained.model
    assert there == here


OFFLINE = (
    "import sys\nfrom flow_grpo.commands.main import main\n"
    "try:\n    main(sys.argv[1:])\n"
    "except SystemExit as end:\n    print('torch' in sys.modules, 'diffusers' in sys.modules)\n    raise\n"
)


@pytest.mark.parametrize(
    "command", [("train", "tiny_grpo", "pretrained.model=org/name"), ("sample", "org/name", "a bag")]
)
def test_without_a_hub_the_answer_comes_before_torch(tmp_path, command):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *command], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "False False\n")
    assert "'org/name' is no folder here, is not in the hub's cache, and cannot be fetched: HF_HUB" in done.stderr
    assert done.stderr.count("\n") == 1


# --- the cache --------------------------------------------------------------------------------------------


def test_a_skipped_encoder_and_its_tokenizer_are_neither_fetched_nor_missed(config, hub, pipelines, tmp_path):
    folder = Path(shutil.copytree(pipelines / "sd3", tmp_path / "model"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)  # what is not there cannot be fetched
    hub.add("org/model", folder)
    hub.add("org/full", pipelines / "sd3")
    for model in ("org/model", "org/full"):
        config.pretrained.model, config.pretrained.skip = model, ("text_encoder_3",)
        settings = resolve(config, 1, False, fetch=True)
        assert load_model(settings.config.pretrained, "no").pipeline.text_encoder_3 is None
        assert whole_folder(model, "", ("text_encoder_3",)) is not None
    assert not [file for file in hub.given if file.startswith(("text_encoder_3", "tokenizer_3"))]


def test_a_digest_is_of_a_whole_model_alone(config, hub, pipelines):
    hub.add("org/model", pipelines / "sd3")
    pretrained = served(config).config.pretrained
    assert base_digest(pretrained) is None
    load_model(pretrained, "no")
    there = base_digest(pretrained)
    config.pretrained.model = str(pipelines / "sd3")
    assert there == base_digest(config.pretrained) is not None


def test_weights_are_whole_with_every_shard(tmp_path):
    assert not cache.has_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert not cache.has_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert cache.has_weights(tmp_path)


# --- parts and prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_parts_of_a_family_are_those_that_its_pipeline_takes(family):
    takes = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters
    given = {"self", "image_encoder", "feature_extractor", "is_distilled"}  # of IP adapters; of the index
    assert set(family.parts) == set(takes) - given


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_part_that_the_index_lacks_is_named(pipelines, tmp_path, case):
    folder = Path(shutil.copytree(pipelines / case.name, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "transformer"):
        (folder / "model_index.json").write_text(json.dumps({key: v for key, v in index.items() if key != part}))
        with pytest.raises(ConfigError, match=rf"config\.pretrained\.model: {folder} has no {part}; "):
            check_pipeline(folder)


@pytest.mark.parametrize(("name", "before"), [("flux2_klein", 1), ("z_image", 6)])
def test_a_length_that_the_chat_template_fills_is_refused_with_the_least(config, pipelines, name, before):
    """Their prefixes: <|im_start|>, and for Z-Image the five letters of "user" and its end of line."""
    folder = pipelines / name
    check_prompt_length(str(folder), folder, before + 1)
    with pytest.raises(ConfigError, match=rf"max_sequence_length = {before} leaves .* takes at least {before + 1}\.$"):
        check_prompt_length(str(folder), folder, before)


@pytest.mark.parametrize("name", ["flux2_klein", "z_image", "qwen_image"])
def test_the_least_length_is_where_two_prompts_begin_to_differ(pipelines, name):
    case = next(case for case in CASES if case.name == name)
    model = class_of(FAMILIES[type(case.build()).__name__])(case.build())

    def differ(length: int) -> bool:
        first, second = (model.encode(prompt, length).prompt_embeds for prompt in ("xyz", "abc"))
        return first.shape != second.shape or not first.equal(second)

    least = {"flux2_klein": 2, "z_image": 7, "qwen_image": 1}[name]
    assert differ(least)
    assert least == 1 or not differ(least - 1)
