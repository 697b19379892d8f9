"""Where a file is that a setting names: the working folder, beside the package, or where the run was started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flow_grpo import paths
from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import leaves
from flow_grpo.recipes.registry import get_config
from flow_grpo.runs.config import PATHS, read_config, write_out_models
from flow_grpo.settings import resolve
from tests.synthetic_runs import write_run

ROOT = Path(__file__).parents[1]
TINY = "assets/tiny_sd3"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_assets_are_found_beside_the_package_from_any_folder(elsewhere):
    assert paths.find(TINY) == str(ROOT / TINY)
    assert paths.find("assets/prompts/tiny/test.txt") == str(ROOT / "assets/prompts/tiny/test.txt")


def test_the_working_folder_wins(elsewhere):
    (elsewhere / TINY).mkdir(parents=True)
    assert paths.find(TINY) == TINY
    assert paths.find("assets/tiny_features") == str(ROOT / "assets/tiny_features")  # which the folder lacks


@pytest.mark.parametrize("path", ["org/name", "flow_grpo/paths.py", "README.md", "assets/nowhere", "/nowhere", ""])
def test_what_is_neither_here_nor_an_asset_stays_as_it_is(elsewhere, path):
    """Also what lies beside the package and is none of its assets: a hub id never turns into a folder of ours."""
    assert paths.find(path) == path


def test_home_is_written_out(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere))
    assert paths.find("~/x") == str(elsewhere / "x")


def test_the_wheels_assets_are_in_the_package(elsewhere, monkeypatch):
    """Its place is found when the module is imported; tests/test_wheel.py does so in an installed wheel."""
    monkeypatch.setattr(paths, "HOME", elsewhere / "flow_grpo")
    (elsewhere / "flow_grpo" / TINY).mkdir(parents=True)
    assert paths.find(TINY) == str(elsewhere / "flow_grpo" / TINY)


@pytest.mark.parametrize("recipe", ["tiny_grpo", "tiny_drtune", "tiny_nsr"])
def test_a_recipe_starts_from_any_folder_and_keeps_its_paths_as_written(elsewhere, recipe):
    config = resolve(get_config(recipe), num_processes=1, cuda=False).config
    assert config.pretrained.model == TINY
    assert str(ROOT) not in json.dumps(config.to_dict())
    assert len(PromptDataset.load(config.prompts.train)) == 10


# --- a run that is looked at from another folder --------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    """Started in tmp_path/home, with prompts and a model of its own there."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.txt").write_text("a bag\n")
    shutil.copytree(ROOT / "assets/tiny_features", home / "models/judge")
    overrides = {"prompts.test": "mine.txt", "eval.judge": "models/judge", "reward_fn.pickscore": 1.0}
    folder = write_run(home / "logs/run", [0.5, 0.6], [0, 10], gradient=False, overrides=overrides)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"working_folder": str(home)}))
    return folder


def test_a_runs_own_files_are_looked_for_where_it_was_started(run, elsewhere):
    config = read_config(run, {})
    assert config.prompts.test == str(run.parents[1] / "mine.txt")
    assert config.eval.judge == str(run.parents[1] / "models/judge")
    assert config.pretrained.model == TINY
    resolve(config, num_processes=1, cuda=False)


def test_a_file_of_that_name_in_the_working_folder_does_not_stand_in_for_the_runs_own(run, elsewhere):
    own = read_config(run, {}).prompts.test
    (elsewhere / "mine.txt").write_text("a boot\n")
    assert read_config(run, {}).prompts.test == own != "mine.txt"


def test_where_a_run_was_started_its_settings_stay_as_written(run, elsewhere, monkeypatch):
    monkeypatch.chdir(Path(read_config(run, {}).prompts.test).parent)
    assert read_config(run, {}).prompts.test == "mine.txt"


def test_a_run_that_begins_names_its_models_by_their_whole_paths_and_assets_and_the_hubs_as_they_are(run, monkeypatch):
    home = run.parents[1]
    monkeypatch.chdir(home)
    models = ("eval.judge=models/judge", "diversity.model=models/judge", "shaping.model=models/judge")
    given = (*models, "reward_model.pickscore=assets/tiny_pickscore, models/judge", "prompts.test=mine.txt")
    config = cli.configure("tiny_grpo", [f"--config.{change}" for change in given], False, get_config)
    assert {config.eval.judge, config.diversity.model, config.shaping.model} == {f"{home}/models/judge"}
    assert config.reward_model.pickscore == f"assets/tiny_pickscore, {home}/models/judge"
    assert (config.pretrained.model, config.reward_model.siglip) == (TINY, "google/siglip2-so400m-patch14-384")
    assert config.prompts.test == "mine.txt"  # no record repeats where prompts are from


def test_a_name_of_open_clip_is_no_folder_of_that_name(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    config = get_config("tiny_grpo")
    config.diversity.extractor, config.diversity.model = "open_clip", "models"
    write_out_models(config)
    assert config.diversity.model == "models"


@pytest.mark.parametrize("kept", [{}, {"working_folder": 3}, {"working_folder": "/nowhere"}])
def test_without_such_a_folder_the_settings_are_as_written(run, elsewhere, kept):
    (run / "environment.json").write_text(json.dumps(kept))
    config = read_config(run, {})
    assert config.prompts.test == "mine.txt"
    with pytest.raises(ConfigError, match=r"mine\.txt does not exist|models/judge' is not a directory"):
        resolve(config, num_processes=1, cuda=False)


def test_every_setting_that_names_a_file_is_among_the_paths():
    """By its default or its meaning; the broken twin is a name that only sounds like one."""
    named = [key for key, value in leaves(get_config("tiny_grpo")) if isinstance(value, str) and "assets/" in value]
    assert named
    assert [key for key in named if not key.startswith(PATHS)] == []
    assert not "lora.target_modules".startswith(PATHS)
