"""The configuration of a run's folder, of the present tree or of one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.recipes.base import RENAMED, get_config, leaves
from flow_grpo.runs.config import config_from

PATH = Path("config.json")


def of_before(former: bool):
    """The settings of a run that knew `train.global_std`."""
    values = dict(leaves(get_config()))
    del values["train.advantage_std"]
    return values | {"train.global_std": former}


@pytest.mark.parametrize(("former", "now"), [(False, "group"), (True, "batch")])
def test_a_run_of_before_is_read_by_the_present_names_of_its_keys(former, now):
    assert config_from(of_before(former), PATH, {}).train.advantage_std == now
    assert config_from(of_before(former), PATH, {"train.advantage_std": "none"}).train.advantage_std == "none"


def test_a_renamed_keys_value_that_never_was_is_told():
    with pytest.raises(ConfigError, match=r"train\.advantage_std = .* is of another kind"):
        config_from(of_before([1]), PATH, {})


def test_every_renamed_key_is_a_key_no_more_and_every_present_one_is():
    declared = dict(leaves(get_config()))
    for former, (now, meanings) in RENAMED.items():
        assert former not in declared
        assert now in declared
        assert declared[now] in meanings.values()
