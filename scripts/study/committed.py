"""Everything that is committed of the study, read for its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_json, read_object
from scripts.study.grids import Sample, samples
from scripts.study.paths import VALIDATION
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.study_records import NOISE_FILE, RUNS_FILE, SCALES_FILE, Study, read_study, rounded

TEXTS = ("form", "source", "label", "method")  # of optional results; what else they hold are numbers or null

Rows = Sequence[Mapping[str, Any]]  # of a JSON file


@dataclass(frozen=True)
class Results:
    """All that is committed, and where."""

    study: Study
    noise: Rows  # rows of gradient_noise.py
    scales: Rows  # entries of lora_scales.py, see claims.frontier
    validation: Rows  # rows of the entropy validation
    samples: Sequence[Sample]  # whose grids are committed


def read_results(out: Path, validation: Path = VALIDATION) -> Results:
    """Everything in a folder of results; ConfigError without its runs.json."""
    rows, study = read_object(validation).get("rows"), read_study(out / RUNS_FILE)
    if not isinstance(rows, list):
        raise ConfigError(f"{validation} has no rows: it is not what validate_entropy.py writes.")
    grids = [sample for sample in samples(study) if (out / sample.file).is_file()]
    noise = _list(out / NOISE_FILE, ("form", "probes", "source", "batches", "value", "low", "high"), "gradient_noise")
    return Results(study, noise, _scales(out / SCALES_FILE, study), rows, grids)


def _scales(path: Path, study: Study) -> list[dict[str, Any]]:
    """The scaled LoRAs; ConfigError where they are of other runs than those of the study."""
    found = _list(path, ("label", "method", "seed", "scale", "seconds", REWARD, VENDI, RKE, ACCURACY), "lora_scales")
    trained = {(record.label, record.seed, rounded(record.final("seconds"))) for record in study.of("claims")}
    for entry in found:
        if (entry["label"], entry["seed"], entry["seconds"]) not in trained:
            raise ConfigError(
                f"{path} has {entry['label']}, seed {entry['seed']}, trained for {entry['seconds']} s, which is no run "
                f"of {path.parent / 'runs.json'}: run scripts/study/lora_scales.py again."
            )
    return found


def _list(path: Path, keys: Sequence[str], script: str) -> list[dict[str, Any]]:
    """The objects of a file, each with these keys; none if there is no file."""
    if not path.is_file():
        return []
    found, wrong = read_json(path), f"{path} is not what scripts/study/{script}.py writes"
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"{wrong}: it is not a list of objects.")
    for entry in found:
        if not set(keys) <= set(entry):
            raise ConfigError(f"{wrong}: an entry lacks one of {', '.join(keys)}.")
        for key in keys:
            if not isinstance(entry[key], str if key in TEXTS else (int, float, type(None))):
                raise ConfigError(f"{wrong}: {key!r} is {str(entry[key])[:60]!r}.")
    return found
