"""fme: its commands and their help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flow_grpo.commands import main
from tests.commands.lines import ROOT, fme, refusal

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_help_names_every_command(capsys):
    assert fme("--help") == fme() == 0
    out = capsys.readouterr().out
    assert all(f"fme {name}" in out for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_commands_help_loads_no_torch(name):
    code = (
        "import sys\nfrom flow_grpo.commands.main import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: fme {name}" in done.stdout


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "fme train"), ("zzz", "there are demo, train"), ("veiw", "view")]
)
def test_a_misspelt_command_is_told_the_nearest(typed, meant, capsys):
    error = refusal(capsys, typed)
    assert f"fme {typed} is not a command" in error
    assert meant in error
