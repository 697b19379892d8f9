"""The wheel holds the package with its commands, templates and tiny models, and works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("flow_grpo", "assets", "pyproject.toml", "setup.py", "README.md", "LICENSE")
NOT_OURS = shutil.ignore_patterns("__pycache__", "figures", "study", "pickscore", "*.egg-info")
SMALL = ["num_epochs=1", "eval_freq=0", "sample.groups_per_epoch=1", "trackers=()", "eval_diversity=false"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: pip writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=NOT_OURS)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder of packages with the wheel in it, as an installation leaves it."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with the wheel's package, and no other of that name, first on its path."""
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def fme(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(site, folder, "-m", "flow_grpo.commands.main", *arguments)


def test_it_holds_the_whole_package_and_nothing_else(site: Path) -> None:
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"flow_grpo"}
    kinds = ("*.py", "*.j2", "*.css", "*.js", "*.json", "py.typed")
    ours = {path.relative_to(ROOT) for kind in kinds for path in (ROOT / "flow_grpo").rglob(kind)}
    packed = {path.relative_to(site) for kind in kinds for path in (site / "flow_grpo").rglob(kind)}
    assert ours - packed == set()
    assert {path.parts[1] for path in packed - ours} == {"assets"}


def test_it_holds_the_tiny_models_and_their_prompts(wheel: Path, site: Path) -> None:
    assets = site / "flow_grpo/assets"
    scenes = ("tiny_scenes", "tiny_scenes_clip", "tiny_scenes_detector", "tiny_scenes_judge", "prompts/scenes")
    folders = ("tiny_features", "tiny_pickscore", "tiny_sd3", "prompts/tiny", *scenes)
    expected = {p.relative_to(ROOT / "assets") for f in folders for p in (ROOT / "assets" / f).rglob("*")}
    packed = {path.relative_to(assets) for path in assets.rglob("*")}
    assert packed - {Path("prompts"), *map(Path, folders)} == expected
    assert wheel.stat().st_size < 22e6


def test_it_installs_the_command(site: Path) -> None:
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "fme = flow_grpo.commands.main:main" in entry_points.read_text()


def test_recipes_are_listed_and_scores_imported_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    done = fme(site, tmp_path, "ls", "recipes", "tiny_drtune")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny_drtune: DRTune on the embedded tiny SD3")
    program = "import flow_grpo; from flow_grpo.diversity import rke_score, vendi_score; print(flow_grpo.__file__)"
    done = python(site, tmp_path, "-c", program)
    assert Path(done.stdout.strip()).is_relative_to(site), done.stderr
    assert list(tmp_path.iterdir()) == []


LIBRARY = """
import numpy as np
import torch
from flow_grpo.diversity import rke, rke_score, vendi, vendi_score
from flow_grpo.entropy import DivergenceEstimator, differential_entropy, ode_log_density
from flow_grpo.rewards.building import build_reward
from flow_grpo.rewards.registry import REWARDS

for eye in (np.eye(4), torch.eye(4)):
    assert abs(vendi_score(eye) - 4) < 1e-9 and abs(vendi.vendi_score(eye) - 4) < 1e-9
    assert rke_score(eye, 0.1) == rke.rke_score(eye, 0.1) > 3.9
x = torch.randn(3, 2, dtype=torch.float64)
found = ode_log_density(lambda x, sigma: 0 * x, x, torch.tensor([1.0, 0.0]), DivergenceEstimator(exact=True))
assert torch.allclose(found.log_prob, torch.distributions.Normal(0, 1).log_prob(x).sum(1))
assert "pickscore" in REWARDS
"""


def test_the_library_works_on_arrays_and_tensors(site: Path, tmp_path: Path) -> None:
    done = python(site, tmp_path, "-c", LIBRARY)
    assert done.returncode == 0, done.stderr


def test_a_training_runs_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    done = fme(site, tmp_path, "train", "tiny_drtune", "--name", "first", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/first/checkpoints/checkpoint-000001").is_dir()
    assert str(site) not in (tmp_path / "logs/first/config.json").read_text()
