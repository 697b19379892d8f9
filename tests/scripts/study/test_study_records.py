"""A file that does not hold a study's results is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flow_grpo.errors import ConfigError
from scripts.study.records import REWARD
from scripts.study.study_records import Study, read_study, write_study
from tests.scripts.study.builders import record


def test_a_file_that_is_no_study_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs\.json is missing: --logs makes it"):
        read_study(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_text('{"runs": [{"name": "x"}], "environments": [], "missing": {}}')
    with pytest.raises(ConfigError, match="does not hold a study's results"):
        read_study(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_bytes(b'{"runs": "\xff"}')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_study(tmp_path / "runs.json")


@pytest.mark.parametrize("value", ["ten", 10**400])
def test_a_column_that_is_not_of_numbers_is_one_sentence(tmp_path: Path, value: object) -> None:
    write_study(Study((), {}, (record("DRTune", 0),)), tmp_path / "runs.json")
    content = json.loads((tmp_path / "runs.json").read_text())
    content["runs"][0]["evaluations"][REWARD][1] = value
    (tmp_path / "runs.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not hold a study's results"):
        read_study(tmp_path / "runs.json")
