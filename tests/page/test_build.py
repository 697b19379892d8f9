"""The page's file: one, whole, escaped, its own scripts alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.page.build import build_page, content_policy, safe_json
from flow_grpo.page.contents import contents_of
from flow_grpo.page.data import read_runs
from tests.page.small_runs import SMALL, data_of
from tests.synthetic_records import write_records


class Elements(HTMLParser):
    """Names and attributes of a page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_one_file_that_names_no_other(tmp_path: Path) -> None:
    page = build_page([write_records(tmp_path / "run", **SMALL)], tmp_path / "deep/er/page.html", "fme view run")
    elements = Elements(page.read_text()).found
    addresses = [value for _, attributes in elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in addresses)
    assert "@import" not in page.read_text()
    assert "url(" not in page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html"]


def test_its_policy_allows_its_own_script_and_style_alone(tmp_path: Path) -> None:
    text = build_page([write_records(tmp_path / "run", **SMALL)], tmp_path / "page.html").read_text()
    policy = next(a["content"] or "" for name, a in Elements(text).found if "http-equiv" in a)
    for kind, content in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert content_policy("a", "b") != content_policy("b", "a")


def test_json_in_the_page_cannot_end_its_element() -> None:
    text = "</script><!-- <b>&\u2028"
    found = safe_json({"prompt": text, "value": math.nan})
    assert not set("<>&\u2028") & set(found)
    assert json.loads(found) == {"prompt": text, "value": None}


def test_a_run_can_be_called_otherwise_than_its_folder(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "visualization", **SMALL)
    page = build_page([folder], tmp_path / "page.html", names=["mine"])
    assert data_of(page)["runs"][0]["name"] == "mine"
    assert "<title>mine" in page.read_text()


def test_names_settings_and_the_command_are_escaped(tmp_path: Path) -> None:
    evil = "<i onclick=x>&"
    folder = write_records(tmp_path / evil, **SMALL, overrides={"prompts.train": evil})
    text = build_page([folder], tmp_path / "page.html", command=f"fme view {evil}").read_text()
    assert not any(name == "i" for name, _ in Elements(text).found)
    assert text.count("&lt;i onclick=x&gt;&amp;") >= 4  # title, folder, setting, command


def test_the_same_folders_give_the_same_page(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    pages = [build_page([folder], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"page\.html cannot be written"):
        build_page([folder], tmp_path / "file/page.html")


def test_film_strips_are_bounded(tmp_path: Path) -> None:
    from PIL import Image

    folder = write_records(tmp_path / "run", epochs=range(0, 60, 10), prompts=("a bag",), noises=8)
    (folder / "images").mkdir()
    for epoch in range(0, 60, 10):
        Image.new("RGB", (4000, 30), "red").save(folder / f"images/eval_strip_{epoch:06d}.png")
    (folder / "images/eval_strip_000050.png").write_bytes(b"no picture")
    strips = contents_of(read_runs([folder]), live=False, label="eval").strips
    assert [strip["name"] for strip in strips] == ["base model", "epoch 20"]  # and epoch 50, which is damaged
    assert all(len(strip["data"]) < 10_000 for strip in strips)


@pytest.mark.parametrize("parts", [(), ("judge",), ("reward",), ("diversity",), ("reward", "judge", "images")])
def test_any_part_may_be_missing(tmp_path: Path, parts: tuple[str, ...]) -> None:
    page = build_page([write_records(tmp_path / "run", **SMALL, parts=parts)], tmp_path / "page.html")
    last = data_of(page)["runs"][0]["evaluations"][-1]
    assert set(last["figures"]) == {name for part in parts for name in
                                    {"judge": ["judge"], "reward": ["reward"], "diversity": ["vendi", "reached"],
                                     "images": []}[part]}  # fmt: skip
    assert last["diversity"] == ("less" if "diversity" in parts else "not_measured")
    assert last["exploitation"] == ("no_reward" if "reward" not in parts else
                                    "not_shown" if "judge" in parts else "no_judge")  # fmt: skip
