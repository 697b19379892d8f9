"""Inside the package, imports go down the list in pyproject.toml; the package needs no script and no absl."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lint() -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_imports_go_down_and_stay_inside():
    done = lint()
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout
