"""A random tiny SD3 and random CLIPs, saved once a session; a configuration that uses them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ml_collections import ConfigDict

from config.base import get_config
from flow_grpo import places
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset, training_prompts
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings, resolve
from scripts.tiny import models as tiny_models

PROMPTS = ("a bag", "a boot", "a red coat", "a sandal")
# Files that take longest, on one core, come first: no worker is left alone with one of them at the end.
LONGEST = (
    "models/test_families.py", "test_compilation.py", "scripts/test_train_sd3.py", "training/test_resume_processes.py",
    "runs/test_stopping.py", "test_processes.py", "training/test_checkpoint.py", "test_parallel.py",
    "page/test_browser.py", "diversity/test_bootstrap.py", "page/test_browser_use.py",
    "scripts/test_visualize_from_checkpoints.py", "scripts/study/test_run.py",
    "test_wheel.py", "test_extending.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files go to a worker, in this order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Parallel workers on few cores run best with one thread each."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sd3/, clip/, judge/ (random weights), prompts.txt and modes.json."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vae_channels": (8, 16, 16), "text_width": 16, "width": 32, "heads": 2, "layers": 2}
    pipeline = tiny_models.build_pipeline(0, **sizes)
    _shake(pipeline.transformer)
    pipeline.save_pretrained(folder / "sd3")
    for seed, name in enumerate(("clip", "judge")):
        model, processor = tiny_models.build_clip(seed, vision_width=32, vision_layers=2, vision_heads=2)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "modes.json").write_text(json.dumps({"a bag": {"red": "a red bag", "blue": "a blue bag"}}))
    return folder


@torch.no_grad()
def _shake(transformer: torch.nn.Module) -> None:
    """Give the zero-initialised output and modulation layers weights, so that every input matters."""
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def config(random_models: Path, tmp_path: Path) -> ConfigDict:
    """Small and fast: 4 prompts x 2 images, 4 steps, one update; change what a test is about."""
    return small_config(random_models, tmp_path)


def small_config(random_models: Path, folder: Path) -> ConfigDict:
    """What the fixture `config` gives, for runs in `folder`."""
    config = get_config()
    config.logdir, config.run_name, config.trackers = str(folder / "logs"), "run", ()
    config.pretrained.model = str(random_models / "sd3")
    for name in ("train", "test", "eval_diversity"):
        config.prompts[name] = str(random_models / "prompts.txt")
    config.diversity.model, config.num_seeds, config.eval_diversity = str(random_models / "judge"), 4, False
    config.reward_fn.pickscore = 1.0
    config.reward_model.pickscore = config.reward_model.clipscore = str(random_models / "clip")
    config.eval.judge, config.eval.modes = str(random_models / "judge"), str(random_models / "modes.json")
    config.eval.num_image_per_prompt, config.eval.num_steps = 2, 4
    config.num_epochs, config.eval_freq, config.save_freq = 2, 0, 0
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.sample.num_steps, config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 4, 4, 2
    config.sample.batch_size = config.train.batch_size = 8
    config.train.updates_per_epoch = 1
    config.drtune.num_train_steps = 2
    return config


def by_method(config: ConfigDict, name: str) -> None:
    """Train by this method, with what its tiny recipe changes; as small as the rest."""
    method = METHODS[name]
    config.use_reward_gradient, config.train.method = method.reward_gradient, name
    if method.reward_gradient:
        config.sample.sde_type = "ode"
    if method.tiny is not None:
        method.tiny(config)
    config.anchored.base_images, config.anchored.base_prompts = (4, 3) if name == "anchored" else (64, 16)
    config.drtune.early_stop = min(config.drtune.early_stop, config.sample.num_steps)


class Parts(SimpleNamespace):
    """What scripts/train/train_sd3.py wires together."""

    settings: Settings
    accelerator: Accelerator
    policy: Policy
    reward: object
    prompts: PromptDataset
    run: Run

    def train(self, method=None) -> dict[str, float]:
        """One epoch, by the configuration's method or by a module's `train_epoch`."""
        train_epoch = places.load(method_of(self.settings.config).loop) if method is None else method.train_epoch
        metrics = train_epoch(self.policy, self.prompts, self.reward, self.settings, self.run)
        self.run.counters.epoch += 1
        return metrics


@pytest.fixture
def build():
    """A function: configuration -> Parts, on one CPU process; the run that it made before has ended by then."""
    runs: list[Run] = []

    def build_parts(config: ConfigDict) -> Parts:
        while runs:
            runs.pop().finish()
        return make_parts(config, runs)

    yield build_parts
    while runs:
        runs.pop().finish()


def make_parts(config: ConfigDict, runs: list[Run]) -> Parts:
    """Build what a training script does; the run is added to `runs` before anything else can fail."""
    settings = resolve(config, num_processes=1, cuda=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one per process, with one precision
    accelerator = Accelerator(mixed_precision=settings.config.mixed_precision, cpu=True)
    runs.append(Run(settings, accelerator))
    return Parts(
        settings=settings,
        accelerator=accelerator,
        policy=Policy.load(settings, accelerator),
        reward=build_reward(settings.config, accelerator.device),
        prompts=training_prompts(settings.config),
        run=runs[-1],
    )
