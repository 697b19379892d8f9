"""A CLIP with random weights and the factor 100 of the real ones."""

from __future__ import annotations

import math

import pytest

from flow_grpo.rewards.clip import ClipScorer
from scripts.tiny.models import build_clip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    model, processor = build_clip(0)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(checkpoint: str) -> ClipScorer:
    return ClipScorer(checkpoint)
