"""Random networks, written as each library writes its own."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from flow_grpo.diversity.features import FeatureExtractor, load_extractor
from tests.diversity.networks import open_clip_config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dinov2/, and open_clip's model.json, weights.pt and weights.safetensors."""
    folder = tmp_path_factory.mktemp("features")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**open_clip_config())
        config = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            layerscale_value=0.5,
        )
        dinov2 = Dinov2Model(config)
    (folder / "model.json").write_text(json.dumps(open_clip_config()))
    torch.save(network.state_dict(), folder / "weights.pt")
    save_file({name: value.clone() for name, value in network.state_dict().items()}, folder / "weights.safetensors")
    dinov2.save_pretrained(folder / "dinov2")
    BitImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture(scope="module")
def checkpoints(models: Path, random_models: Path) -> dict[str, tuple[str, str]]:
    """Of each kind, a model and its `pretrained`."""
    return {
        "clip": (str(random_models / "clip"), ""),
        "dinov2": (str(models / "dinov2"), ""),
        "open_clip": (str(models / "model.json"), str(models / "weights.pt")),
    }


@pytest.fixture(scope="module")
def extractors(checkpoints: dict[str, tuple[str, str]]) -> dict[str, FeatureExtractor]:
    return {kind: load_extractor(kind, *checkpoint) for kind, checkpoint in checkpoints.items()}
