"""What a training says besides its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from flow_grpo.training.words import not_sharded, unread_negatives


@pytest.mark.parametrize(("trained", "evaluated", "path"), [(1.0, 1.0, "a"), (2.0, 1.0, "b"), (2.0, 2.0, None)])
def test_a_file_is_named_whose_negative_prompts_nothing_reads(
    config: ConfigDict, tmp_path: Path, trained: float, evaluated: float, path: str | None
) -> None:
    for key, name in (("train", "a"), ("test", "b")):
        config.prompts[key] = str(tmp_path / f"{name}.jsonl")
        Path(config.prompts[key]).write_text(json.dumps({"prompt": name, "negative_prompt": "blurry"}))
    config.sample.guidance_scale, config.eval.guidance_scale = trained, evaluated
    said = unread_negatives(config)
    if path is None:
        assert said == ""
    else:
        kind = {"a": "sample", "b": "eval"}[path]
        assert str(tmp_path / f"{path}.jsonl") in said
        assert f"(config.{kind}.guidance_scale = 1)" in said


def test_nothing_is_said_where_no_prompt_has_a_negative_one(config: ConfigDict) -> None:
    assert unread_negatives(config) == ""


def test_one_process_is_told_that_it_shares_its_weights_with_none(config: ConfigDict) -> None:
    assert not_sharded(config, 1) == ""
    config.sharding = "full"
    assert not_sharded(config, 1).startswith('config.sharding = "full" ')
    assert not_sharded(config, 2) == ""
