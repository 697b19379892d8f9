"""What is known of a detector of scenes from its small files. Torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.paths import find

RESOLUTION = 64  # pixels of a scene
MODEL_TYPE = "scene_detector"  # of a detector's config.json
DETECTOR_NEEDS = (("config.json",), ("model.safetensors",))


def is_detector(model: str) -> bool:
    """Whether a model is the folder of a detector, and no CLIP."""
    settings = Path(find(model)) / "config.json"
    return os.path.isfile(settings) and read_object(settings).get("model_type") == MODEL_TYPE


def check_detector(subject: str, settings: Mapping[str, Any]) -> None:
    """ConfigError, beginning with `subject`, unless the settings of a model are those of a detector."""
    found = settings.get("model_type")
    if found != MODEL_TYPE:
        raise ConfigError(f"{subject} is no detector of scenes but {found!r}; assets/tiny_scenes_detector is one.")
