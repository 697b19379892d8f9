"""The records of evaluations: written, read, refused, compared with the base."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist, pdist

from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.files import write_atomically
from flow_grpo.runs import evaluations
from flow_grpo.runs.changes import with_changes
from flow_grpo.runs.evaluations import copy_base, read_record, record_path, records_of, write_record
from flow_grpo.runs.record import Distances, Judged, Record

PROMPTS, NOISES = ("a bag", "a <b>boot</b>", "a coat"), 6


def unit(generator, spread, count=NOISES):
    """(P, n, d) features of unit length around a direction of each prompt."""
    x = np.eye(8)[: len(PROMPTS), None] + spread * generator.normal(size=(len(PROMPTS), count, 8))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


BASE = unit(np.random.default_rng(0), 0.6)


def made(epoch=10, reward=0.5, features=BASE, base=BASE, wrong=0) -> Record:
    """NOISES images of each prompt; the judge takes the first `wrong` for the next prompt."""
    prompt = [p for p in range(len(PROMPTS)) for _ in range(NOISES)]
    total = [reward + 0.01 * i for i in range(len(prompt))]
    guess = [(p + (i < wrong)) % len(PROMPTS) for i, p in enumerate(prompt)]
    return Record(
        label="eval",
        epoch=epoch,
        prompts=list(PROMPTS),
        prompt=prompt,
        noise=[s for _ in PROMPTS for s in range(NOISES)],
        seconds=12.5,
        network_evaluations=800,
        rewards={"total": total, "pickscore": [2 * x for x in total]},
        judge=Judged("judge", True, guess, [0.5] * len(prompt)),
        diversity=Distances(
            "clip:x", 1.0, [0, 1, 2], [NOISES] * 3, [list(range(NOISES))] * 3,
            [pdist(x).tolist() for x in features],
            None if epoch == 0 else [cdist(x, y).ravel().tolist() for x, y in zip(base, features, strict=True)],
            [vendi_score(x) for x in features], None,
        ),
        extra={"diversity/vendi": 1.25, "entropy/nats": None},
    )  # fmt: skip


def images(record, height=8, width=8):
    return np.random.default_rng(1).random((len(record.prompt), 3, height, width)).astype(np.float32)


# --- round trip -----------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_to_six_digits(tmp_path):
    record = with_changes(made(reward=0.7, wrong=3), made(epoch=0))
    path = write_record(tmp_path, record, images(record))
    found = read_record(path)
    assert path == record_path(tmp_path, "eval", 10)
    assert found.sprite is not None
    plain, expected = asdict(replace(found, sprite=None, folder=Path())), asdict(record)
    assert plain.keys() == expected.keys()
    flat, wanted = np.array(list(numbers(plain))), np.array(list(numbers(expected)))
    np.testing.assert_allclose(flat, wanted, rtol=5e-6, atol=0)
    assert (found.prompts, found.folder) == (list(PROMPTS), tmp_path / "evaluations")


def numbers(value):
    """Every number of nested plain data, in order; nan for None."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif value is None or isinstance(value, int | float):
        yield math.nan if value is None else value


def test_the_file_is_strict_json_and_what_is_not_finite_is_null(tmp_path):
    record = made()
    record = replace(record, rewards={"total": [math.nan] * len(record.prompt)}, extra={"x": math.inf})
    path = write_record(tmp_path, record, None)
    plain = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert plain["format"] == 1
    assert set(plain["rewards"]["total"]) == {plain["extra"]["x"]} == {None}
    assert read_record(path).rewards["total"] == [None] * len(record.prompt)


def test_small_images_are_all_kept_as_they_are(tmp_path):
    record = made()
    pixels = images(record, 10, 12)
    found = read_record(write_record(tmp_path, record, pixels))
    assert found.sprite.images == list(range(len(record.prompt)))
    assert found.sprite.cell == (12, 10)
    sheet = np.asarray(Image.open(found.sprite_path))
    for place in (0, 15, 17):
        row, column = divmod(place, found.sprite.columns)
        tile = sheet[row * 10 : row * 10 + 10, column * 12 : column * 12 + 12]
        np.testing.assert_array_equal(tile, (pixels[place].transpose(1, 2, 0) * 255).round())


def test_large_images_are_reduced_and_bounded(tmp_path):
    prompts, noises = [f"prompt {i}" for i in range(12)], 9
    record = Record(
        "eval", 0, prompts, [p for p in range(12) for _ in range(noises)], [s for _ in prompts for s in range(noises)]
    )
    pixels = np.broadcast_to(np.float32(0.25), (len(record.prompt), 3, 512, 384))
    found = read_record(write_record(tmp_path, record, pixels))
    assert len(found.sprite.images) == 80
    assert {(record.prompt[i], record.noise[i]) for i in found.sprite.images} == {
        (p, s) for p in range(10) for s in range(8)
    }
    assert found.sprite.cell == (144, 192)
    assert Image.open(found.sprite_path).size == (16 * 144, 5 * 192)


@pytest.mark.parametrize(("width", "kept"), [(64, 256), (4, 255 * 16)])
def test_a_sprite_holds_a_million_pixels_and_is_no_taller_than_webp_can_be(tmp_path, width, kept):
    """16383 pixels: 255 rows of 64."""
    number = 4096
    record = Record("eval", 0, ["a bag"], [0] * number, list(range(number)))
    images = np.broadcast_to(np.float32(0.5), (number, 3, 64, width))
    sprite = read_record(write_record(tmp_path, record, images)).sprite
    assert len(sprite.images) == kept
    with Image.open(tmp_path / "evaluations" / sprite.file) as picture:
        assert picture.size == (16 * width, kept // 16 * 64)


def test_an_image_of_nan_is_black(tmp_path):
    record = made()
    pixels = np.full((len(record.prompt), 3, 4, 4), np.nan, np.float32)
    found = read_record(write_record(tmp_path, record, pixels))
    assert np.asarray(Image.open(found.sprite_path)).max() == 0


def test_reading_imports_no_torch():
    code = "import sys; from flow_grpo.runs import evaluations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# --- a full disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_at", [".webp", ".json"])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_leaves_nothing_of_a_record(tmp_path, monkeypatch, full_at, again):
    record = made()
    if again:
        write_record(tmp_path, record, images(record))

    def full(path, content):
        if path.suffix == full_at:
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr(evaluations, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path, record, images(record))
    assert list((tmp_path / "evaluations").iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------------


def damaged(tmp_path, edit):
    path = write_record(tmp_path, made(), images(made()))
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))
    return path


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(plain):
        for key in keys:
            plain = plain[key]
        plain[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (put("format", 2), "is of format 2, but this version reads up to 1"),
        (put("format", None), "damaged: its format is missing"),
        (put("prompts", ["a", "a", "b"]), "prompts are not distinct"),
        (put("prompt", 0, 3), "prompt is not whole numbers below 3"),
        (put("prompt", 0, True), "prompt is not whole"),
        (put("noise", [0]), "noise is not a list of 18"),
        (put("noise", 0, 1), "an image is in it twice"),
        (put("rewards", []), "rewards is not an object"),
        (put("rewards", "total", [1.0]), r"rewards\.total is not a list of 18"),
        (put("rewards", "total", 0, math.nan), r"rewards\.total is not a list of finite"),
        (put("rewards", "total", 0, 10**400), r"rewards\.total is not a list of finite"),
        (put("judge", "guess", 0, 3), r"judge\.guess"),
        (put("judge", "probability", 0, "1"), r"judge\.probability is not a list of finite"),
        (put("sprite", "file", "../x.webp"), r"sprite\.file"),
        (put("sprite", "cell", [8, 100000]), r"sprite\.cell is not a size"),
        (put("sprite", "columns", 0), r"sprite\.columns is not a whole number of at least 1"),
        (put("sprite", "images", 0, 18), r"sprite\.images is not whole numbers below 18"),
        (put("diversity", "within", 0, [0.1]), r"diversity\.within\.0 is not a list of 15"),
        (put("diversity", "to_base", [[0.1] * 36]), r"diversity\.to_base is not a list of 3"),
        (put("diversity", "noise", 1, 0, -1), r"diversity\.noise\.1 is not whole"),
        (put("diversity", "vendi", 0, None), r"diversity\.vendi is not a list of finite"),
        (put("changes", {"reward": {"old": 1}}), r"it lacks changes\.reward\.new"),
        (put("extra", {"x": "y"}), r"extra\.x is not a finite number"),
        (put("epoch", -1), "epoch is not a whole number of at least 0"),
        (lambda plain: plain.pop("label"), "it lacks label"),
        (put("rewards", "total", 0, 0.25), "its numbers are not those that were written"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(tmp_path, edit, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        read_record(damaged(tmp_path, edit))
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


def test_damaged_records_are_left_out_with_one_word(tmp_path, capsys):
    for epoch in (20, 0, 10, 30):
        write_record(tmp_path, made(epoch), None)
    write_record(tmp_path, replace(made(), label="eval_ema"), None)
    for epoch in (10, 30):
        record_path(tmp_path, "eval", epoch).write_text("{")
    assert [record.epoch for record in records_of(tmp_path)] == [0, 20]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "eval_000010.json is not JSON" in said
    assert "and 1 more" in said
    assert [record.label for record in records_of(tmp_path, "eval_ema")] == ["eval_ema"]
    assert records_of(tmp_path / "nowhere") == []


# --- a run that branches off ----------------------------------------------------------------------------


def test_the_base_models_records_are_copied_byte_for_byte_and_never_over_others(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    folder.mkdir()
    for epoch in (0, 10):
        write_record(source, made(epoch), images(made()))
    copy_base(source, folder)
    assert contents(folder) == {k: v for k, v in contents(source).items() if "_000000." in k}
    write_record(source, made(0, reward=0.9), None)
    copy_base(source, folder)
    assert read_record(record_path(folder, "eval", 0)).rewards["total"][0] == 0.5


def contents(run):
    return {path.name: path.read_bytes() for path in (run / "evaluations").iterdir()}


def test_a_damaged_base_record_is_not_copied(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    folder.mkdir()
    write_record(source, made(0), None).write_text("{}")
    with pytest.raises(ConfigError, match="its format is missing"):
        copy_base(source, folder)
    assert not (folder / "evaluations").exists()


# --- changes --------------------------------------------------------------------------------------------


def test_changes_are_of_the_images_that_both_have():
    base, record = made(epoch=0), made(reward=0.6, wrong=4)
    found = with_changes(record, base).changes
    assert set(found) == {"reward", "vendi", "reached", "judge"}
    assert found["reward"].difference == pytest.approx(0.1)
    assert (found["reward"].images, found["reward"].paired) == (18, True)
    assert found["judge"].difference == pytest.approx(-4 / 18)
    assert found["vendi"].difference == pytest.approx(0, abs=1e-9)
    assert found["reached"].difference == 0


def test_a_collapse_is_fewer_different_images_and_fewer_reached():
    narrow = unit(np.random.default_rng(2), 0.02)
    found = with_changes(made(features=narrow), made(epoch=0)).changes
    assert found["vendi"].new == pytest.approx(np.mean([vendi_score(x) for x in narrow]), rel=1e-6)
    assert found["vendi"].high < 0
    assert found["reached"].new < 0.5


def test_images_that_only_one_has_and_those_not_measured_are_left_out():
    base, record = made(epoch=0), made(reward=0.6)
    other = replace(record, noise=[s + (s == 0) * 100 for s in record.noise])
    assert with_changes(other, base).changes["reward"].images == 15
    missing = replace(record, rewards={"total": [None, *record.rewards["total"][1:]]})
    assert with_changes(missing, base).changes["reward"].images == 17
    assert "reward" not in with_changes(replace(record, rewards={}), base).changes
    assert set(with_changes(replace(record, judge=None, diversity=None), base).changes) == {"reward"}


def test_records_of_images_drawn_otherwise_are_not_compared():
    base = made(epoch=0)
    assert with_changes(replace(made(), setting="a"), replace(base, setting="a")).changes
    assert with_changes(replace(made(), setting="a"), replace(base, setting="b")).changes == {}


def test_distances_of_other_features_and_guesses_of_another_judge_are_not_compared():
    base, record = made(epoch=0), made()
    other = replace(
        record, judge=replace(record.judge, model="x"), diversity=replace(record.diversity, features="dinov2:x")
    )
    assert set(with_changes(other, base).changes) == {"reward"}


def test_a_judge_that_chose_among_other_prompts_is_not_compared():
    """Among fewer, more guesses are right by chance; the prompts are the same, but one was never judged."""
    base, record = made(epoch=0), made()
    assert "judge" in with_changes(record, base).changes
    judge = record.judge
    fewer = [None if p == 0 else guess for p, guess in zip(record.prompt, judge.guess, strict=True)]
    other = replace(record, judge=replace(judge, guess=fewer))
    assert "judge" not in with_changes(other, base).changes
