"""fme view: where the page goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.lines import ROOT, fme, refusal
from tests.synthetic_runs import write_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_the_page_of_one_run_lies_in_it_and_of_several_beside_them(capsys, tmp_path):
    runs = [write_run(tmp_path / name, [0.5, 0.6], [0, 10], gradient=True) for name in ("a", "b")]
    assert fme("view", str(runs[0])) == 0
    assert capsys.readouterr().out == f"page: {runs[0] / 'page.html'}\n"
    assert fme("view", *map(str, runs)) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n"
    assert fme("view", str(runs[0]), "--out", "mine.html") == 0
    assert capsys.readouterr().out == "page: mine.html\n"
    assert "fme view" in Path("mine.html").read_text()


def test_what_is_no_run_has_no_page(capsys, tmp_path):
    assert "is not a folder" in refusal(capsys, "view", str(tmp_path / "nowhere"))
    run = write_run(tmp_path / "a", [0.5, 0.6], [0, 10], gradient=True)
    assert "eval_ema" in refusal(capsys, "view", str(run), "--ema")


def test_a_page_is_made_without_torch(tmp_path):
    run = write_run(tmp_path / "a", [0.5, 0.6], [0, 10], gradient=True)
    code = f"import sys\nfrom flow_grpo.commands.main import main\nmain(['view', {str(run)!r}])\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_page_replaces_nothing_but_a_page(earlier, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert "ends in .html" in refusal(capsys, "view", str(earlier), "--out", str(tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
