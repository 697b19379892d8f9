"""What holds for every reward with a network: gradient, precision, offloading, and the sentence for a wrong file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.model_checks import fetch_small_files
from flow_grpo.models import hub
from flow_grpo.rewards.building import build_reward
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.settings import resolve
from tests.pictures import make_images
from tests.rewards.networks import CASES
from tests.rewards.scoring import NO_METADATA, make_config

PROMPTS = ["a red sneaker", "a bag", "a very blue coat", "a dress"]
NAMES = list(CASES)
WHOLE = ("hpsv2", "siglip")  # they see every pixel of an image of any shape; the others its centre


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in found.items():
        CASES[name].save(folder)
    return found


def scores_of(scorer: Any, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    return CASES[name].reward(scorer)(images, prompts, NO_METADATA * len(images))


def in_double(scorer: Any) -> Any:
    scorer.model.double()
    if hasattr(scorer, "head"):
        scorer.head.double()
    return scorer


def gradient_of(scorer: Any, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    scores = scores_of(scorer, name, images, PROMPTS[: len(images)])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


@pytest.mark.parametrize("size", [(48, 48), (32, 48)])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_pixel_and_equals_finite_differences(
    name: str, size: tuple[int, int], folders: dict[str, Path]
) -> None:
    scorer = in_double(CASES[name].scorer(str(folders[name])))
    images = 0.1 + 0.8 * make_images(*size, count=2)[:1].double()
    _, gradient = gradient_of(scorer, name, images)
    margin = 0 if name in WHOLE else (size[1] - size[0]) // 2
    seen = gradient[..., margin : size[1] - margin]
    assert seen.abs().min() > 0
    assert (gradient != 0).sum() == seen.numel()

    step, flat = 1e-5, gradient.flatten()
    pixels = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(1))[:20]
    nudges = step * F.one_hot(pixels, flat.numel()).double().view(-1, *images.shape[1:])
    prompts = PROMPTS[:1] * len(pixels)
    up, down = (scores_of(scorer, name, images + sign * nudges, prompts) for sign in (1, -1))
    torch.testing.assert_close(flat[pixels], (up - down) / (2 * step), rtol=1e-4, atol=1e-5 * flat.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_frozen_and_scores_float32_whatever_the_code_around(name: str, folders: dict[str, Path]) -> None:
    scorer, images = CASES[name].scorer(str(folders[name])), make_images(40, 40)
    scores, gradient = gradient_of(scorer, name, images)
    assert scores.shape == (4,)
    assert scores.dtype == gradient.dtype == torch.float32
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in scorer.model.parameters())
    assert not scorer.model.training
    with torch.autocast("cpu", torch.bfloat16):
        inside = scores_of(CASES[name].scorer(str(folders[name])), name, images, PROMPTS)
    torch.testing.assert_close(inside, scores, rtol=1e-4, atol=1e-6)  # bf16 moves it by a hundred times as much


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_weights_give_the_same_scores_and_gradients(name: str, folders: dict[str, Path]) -> None:
    images = make_images(40, 40)
    offloaded = CASES[name].scorer(str(folders[name]), offload=True)
    before = list(offloaded.model.parameters())
    for kept, away in zip(
        gradient_of(CASES[name].scorer(str(folders[name])), name, images),
        gradient_of(offloaded, name, images),
        strict=True,
    ):
        torch.testing.assert_close(away, kept, rtol=1e-4, atol=1e-6)
    assert all(a is b for a, b in zip(before, offloaded.model.parameters(), strict=True))


# The most by which bf16 moves a score here, as a share of the spread of the scores over images, and the cosine of the
# gradients.
BF16 = {"hpsv2": (0.2, 0.99), "siglip": (0.2, 0.99), "aesthetic": (0.2, 0.99), "imagereward": (0.2, 0.98)}


@pytest.mark.parametrize("name", NAMES)
def test_bf16_differs_by_its_rounding(name: str, folders: dict[str, Path]) -> None:
    images = make_images(40, 40)
    exact, exact_gradient = gradient_of(CASES[name].scorer(str(folders[name])), name, images)
    scores, gradient = gradient_of(CASES[name].scorer(str(folders[name]), dtype="bf16"), name, images)
    share, cosine = BF16[name]
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < share * exact.std()
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > cosine


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_images_and_prompts_beside_it(name: str, folders: dict[str, Path]) -> None:
    scorer, images = in_double(CASES[name].scorer(str(folders[name]))), make_images(40, 40).double()
    together = scores_of(scorer, name, images, PROMPTS)
    alone = torch.cat([scores_of(scorer, name, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    others = scores_of(scorer, name, images, PROMPTS[::-1])
    assert torch.equal(others, together) is not CASES[name].reads


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_from_a_configuration(name: str, folders: dict[str, Path]) -> None:
    config = make_config("", **{name: 2.0})
    config.reward_model[name], config.use_reward_gradient, config.eval.judge = str(folders[name]), True, ""
    resolve(config, 1, False)
    images = make_images(40, 40)
    total = build_reward(config, "cpu")(images, PROMPTS, NO_METADATA * 4).total
    torch.testing.assert_close(total, 2 * scores_of(CASES[name].scorer(str(folders[name])), name, images, PROMPTS))


def test_the_hub_is_asked_for_a_file_that_the_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(hub, "ask", lambda subject, model, revision, file: asked.append((model, file)))
    monkeypatch.setattr(hub, "fetch", lambda subject, model, revision="", file="": asked.append((model, file)))
    config = make_config("", **dict.fromkeys(NAMES, 1.0))
    config.eval.judge = ""
    fetch_small_files(config)
    assert set(asked) == {(REWARDS[name].model, REWARDS[name].hub_file) for name in NAMES}
    assert ("xswu/HPSv2", "HPS_v2.1_compressed.pt") in asked
    assert ("google/siglip2-so400m-patch14-384", "config.json") in asked


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "imagereward"])
def test_files_that_lack_or_add_a_weight_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / name)
    path = folder / REWARDS[name].hub_file
    kept = torch.load(path)
    inside = kept.get("state_dict", kept)
    last = sorted(inside)[-1]
    tensor = inside.pop(last)
    torch.save(kept, path)
    assert "lacks" in refusal(name, folder) or "cannot be loaded" in refusal(name, folder)
    inside |= {last: tensor, "another.weight": tensor}
    torch.save(kept, path)
    assert f"the file of weights of '{folder}' has a stray another.weight." == refusal(name, folder)
    path.unlink()
    assert f"'{folder}' has no {path.name}" in refusal(name, folder)


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "imagereward"])
def test_what_is_pickled_in_a_file_of_weights_is_not_run(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / name)
    torch.save({"state_dict": {}, "more": Mark(str(tmp_path / "ran"))}, folder / REWARDS[name].hub_file)
    assert "cannot be loaded" in refusal(name, folder)
    assert not (tmp_path / "ran").exists()


class Mark:
    """It makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        CASES[name].scorer(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)
