"""The distances that the record of an evaluation keeps, and the base model's features, which they are also taken to.

RUN/evaluations/base_features.safetensors holds a tensor (n, d) for each prompt, and the name of the features. It is
written when the base model is evaluated, and read by every session that goes on with the run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.spatial.distance import cdist, pdist

from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, write_atomically
from flow_grpo.models.files import first_line
from flow_grpo.runs.folder import BASE_FEATURES, EVALUATIONS
from flow_grpo.runs.record import Distances

Features = Mapping[str, np.ndarray]  # prompt -> (n, d), of unit length
MOST_DISTANCES = 1_000_000  # in a record: about 10 MB of JSON
LEAST_IMAGES = 4  # of a prompt, however many prompts there are


def distances_of(
    features: Features,
    noise: Sequence[Sequence[int]],
    extractor: str,
    order: float,
    bandwidth: float | None,
    base: Features | None = None,
) -> Distances:
    """Of all images, or the first of each prompt where that is more than MOST_DISTANCES numbers.

    Args:
        features: unit features by prompt, in the order of the record's prompts.
        noise: the numbers of their images' noises, prompt by prompt.
        extractor: the name of the features.
        order: q of the Vendi score.
        bandwidth: of RKE; None: it is not measured.
        base: those of the base model; None: these are. A prompt that they lack, or have other images of, leaves out
            the distances to the base.
    """
    most = max(LEAST_IMAGES, math.isqrt(2 * MOST_DISTANCES // (3 * max(len(features), 1))))  # n^2 and n (n - 1) / 2
    kept = {prompt: np.asarray(group[:most], np.float64) for prompt, group in features.items()}
    known = base is not None and all(len(base.get(prompt, ())) == len(group) for prompt, group in features.items())
    return Distances(
        features=extractor,
        order=order,
        prompts=list(range(len(kept))),
        images=[len(group) for group in kept.values()],
        noise=[numbers[:most] for numbers in noise],
        within=[pdist(group).tolist() for group in kept.values()],
        to_base=[cdist(base[prompt][:most], group).ravel().tolist() for prompt, group in kept.items()]
        if base is not None and known
        else None,
        vendi=[vendi_score(group, order) for group in kept.values()],
        rke=None if bandwidth is None else [rke_score(group, bandwidth) for group in kept.values()],
    )


def base_features_path(run: Path) -> Path:
    """Of a run's folder."""
    return run / EVALUATIONS / BASE_FEATURES


def write_base_features(run: Path, features: Features, extractor: str) -> None:
    """Keep the base model's features with a run; OSError as of any file."""
    path = base_features_path(run)
    path.parent.mkdir(exist_ok=True)
    arrays = {prompt: np.ascontiguousarray(group, np.float32) for prompt, group in features.items()}
    write_atomically(path, save(arrays, {"features": extractor, "sha256": _digest(arrays)}))


def _digest(features: Features) -> str:
    found = hashlib.sha256()
    for prompt in sorted(features):
        found.update(features[prompt].tobytes())
    return found.hexdigest()


def read_base_features(run: Path, extractor: str) -> dict[str, np.ndarray] | None:
    """Those that a run keeps; None if it keeps none of this extractor.

    Raises:
        ConfigError: the file is damaged.
    """
    path = base_features_path(run)
    if not path.exists():
        return None
    open_regular(path).close()
    try:
        with safe_open(path, "numpy") as file:
            words = file.metadata() or {}
            found = {prompt: file.get_tensor(prompt) for prompt in file.keys()}  # noqa: SIM118 # no mapping
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged: {first_line(error)}.") from None
    if words.get("sha256") != _digest(found):
        raise ConfigError(f"{path} is damaged: its features are not those that were written.")
    return found if words.get("features") == extractor else None
