"""flow_grpo/prompts.py: prompt files, and the K-repeat sampler."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flow_grpo import prompts as prompts_module
from flow_grpo.batching import plan_batches
from flow_grpo.errors import ConfigError
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.prompts import PromptDataset, own_negatives, training_prompts
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import PromptBatch

SEED = 3


def dataset(size: int) -> PromptDataset:
    return PromptDataset(tuple(f"prompt {i}" for i in range(size)), tuple({"row": i} for i in range(size)))


def all_ranks(data: PromptDataset, groups: int, size: int, processes: int, epoch: int = 0) -> list[PromptBatch]:
    plan = plan_batches(groups, size, updates=1, num_processes=processes)
    return [epoch_prompts(data, plan, SEED, epoch * plan.groups, rank) for rank in range(processes)]


def joined(batches: list[PromptBatch]) -> tuple[list[str], list[dict], list[int], list[int]]:
    return (
        [prompt for batch in batches for prompt in batch.prompts],
        [dict(entry) for batch in batches for entry in batch.metadata],
        torch.cat([batch.sample_ids for batch in batches]).tolist(),
        torch.cat([batch.group_ids for batch in batches]).tolist(),
    )


# --- the sampler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_groups_are_complete_disjoint_and_hold_one_prompt_each(processes):
    groups, size = 6, 7  # 42 images: with 2 or 3 processes and any batch, groups are cut
    prompts, metadata, sample_ids, group_ids = joined(all_ranks(dataset(50), groups, size, processes))
    assert sample_ids == list(range(groups * size))
    assert Counter(group_ids) == dict.fromkeys(range(groups), size)
    for group in range(groups):
        assert len({prompt for prompt, of in zip(prompts, group_ids, strict=True) if of == group}) == 1
    assert [f"prompt {entry['row']}" for entry in metadata] == prompts


def test_groups_may_be_cut_by_processes_and_by_batches():
    first, second = all_ranks(dataset(50), 3, 6, 2)
    assert set(first.group_ids.tolist()) & set(second.group_ids.tolist()) == {1}
    chunks = first.group_ids.split(4)  # sample.batch_size = 4
    assert set(chunks[0].tolist()) & set(chunks[1].tolist()) == {0}


WEIGHTED = replace(dataset(11), weights=[0.0, 5.0, *[1.0] * 9])
BALANCED = replace(dataset(11), categories=[[0, 1, 2, 3, 4, 5, 6], [7, 8], [9, 10]])


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("epoch", [0, 1, 9])
@pytest.mark.parametrize("data", [dataset(11), WEIGHTED, BALANCED], ids=["uniform", "weighted", "balanced"])
def test_processes_together_make_what_one_process_makes(processes, epoch, data):
    assert joined(all_ranks(data, 6, 7, processes, epoch)) == joined(all_ranks(data, 6, 7, 1, epoch))


def test_a_sampler_keyed_by_process_would_cut_groups_into_other_prompts():
    """The broken twin: each process draws for itself."""

    def drawn(rank: int) -> list[int]:
        return torch.randperm(50, generator=keyed_generator(SEED, "prompts", rank)).tolist()[:3]

    assert drawn(0) != drawn(1)


@pytest.mark.parametrize(("size", "groups"), [(10, 10), (10, 4), (7, 3), (5, 12), (1, 3)])
def test_every_prompt_is_used_once_before_any_is_used_again(size, groups):
    data = dataset(size)
    plan = plan_batches(groups, group_size=2, updates=1, num_processes=1)
    stream = [p for epoch in range(3 * size) for p in epoch_prompts(data, plan, SEED, epoch * groups, 0).prompts[::2]]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == sorted(data.prompts)


def test_the_order_changes_from_pass_to_pass_and_with_the_seed():
    data, plan = dataset(20), plan_batches(20, 1, 1, 1)
    first = epoch_prompts(data, plan, SEED, 0, 0).prompts
    assert first != epoch_prompts(data, plan, SEED, 20, 0).prompts
    assert first != epoch_prompts(data, plan, SEED + 1, 0, 0).prompts
    assert first != data.prompts


@pytest.mark.parametrize("data", [dataset(11), WEIGHTED, BALANCED], ids=["uniform", "weighted", "balanced"])
def test_a_resumed_epoch_is_drawn_as_if_the_earlier_ones_had_been(data):
    plan = plan_batches(3, 4, 2, 2)
    unbroken = [epoch_prompts(data, plan, SEED, 3 * epoch, 1) for epoch in range(6)]
    resumed = epoch_prompts(data, plan, SEED, 15, 1)
    assert resumed.prompts == unbroken[5].prompts
    assert torch.equal(resumed.sample_ids, unbroken[5].sample_ids)


def test_another_number_of_groups_on_the_way_neither_repeats_nor_skips_a_prompt():
    """7 prompts: epochs of 3 groups, then of 2."""
    data, few, fewer = dataset(7), plan_batches(3, 1, 1, 1), plan_batches(2, 1, 1, 1)
    drawn = [*epoch_prompts(data, few, SEED, 0, 0).prompts]
    for start in (3, 5):
        drawn += epoch_prompts(data, fewer, SEED, start, 0).prompts
    assert sorted(drawn) == sorted(data.prompts)


def drawn(data: PromptDataset, count: int) -> list[int]:
    """The rows of the first so many groups."""
    plan = plan_batches(count, 1, 1, 1)
    return [entry["row"] for entry in epoch_prompts(data, plan, SEED, 0, 0).metadata]


def test_prompts_are_drawn_by_their_weights():
    """A pass has 11 places and the weights sum to 14: 5 of them are 55 / 14 places, one is 11 / 14, 0 is none."""
    counts = Counter(drawn(WEIGHTED, 11 * 14))
    assert counts[0] == 0
    assert counts[1] == pytest.approx(55, abs=14)
    for number in range(14):
        places = Counter(drawn(WEIGHTED, 11 * 14)[11 * number : 11 * (number + 1)])
        assert places[1] in (3, 4)
        assert max(places[row] for row in range(2, 11)) <= 1


def test_categories_are_drawn_equally_often_and_their_prompts_in_turn():
    rows = drawn(BALANCED, 3 * 14)
    for start in range(0, len(rows), 3):
        assert [sum(row in of for row in rows[start : start + 3]) for of in BALANCED.categories] == [1, 1, 1]
    assert Counter(rows) == {**dict.fromkeys(range(7), 2), **dict.fromkeys(range(7, 11), 7)}


def test_sampling_does_not_touch_the_global_random_state():
    state = torch.get_rng_state()
    all_ranks(dataset(7), 6, 2, 2)
    assert torch.equal(torch.get_rng_state(), state)


# --- files ----------------------------------------------------------------------------------------------


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_text_files_have_a_prompt_a_line_and_may_have_blank_lines(tmp_path):
    data = PromptDataset.load(write(tmp_path, "p.txt", "\ufeffa cat \r\n\n  \nein grüner Hund\n"))
    assert data.prompts == ("a cat", "ein grüner Hund")
    assert data.metadata == ({}, {})


def test_json_lines_keep_what_else_they_say(tmp_path):
    data = PromptDataset.load(write(tmp_path, "p.jsonl", '{"prompt": "two cats", "count": 2}\n\n{"prompt": "a"}\n'))
    assert data.prompts == ("two cats", "a")
    assert data.metadata == ({"count": 2}, {})


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(tmp_path, end):
    assert PromptDataset.load(write(tmp_path, "p.txt", end.join(["a cat", "", "a dog"]))).prompts == ("a cat", "a dog")
    lines = end.join(['{"prompt": "a", "row": 0}', '{"prompt": "b", "row": 1}'])
    assert PromptDataset.load(write(tmp_path, "p.jsonl", lines)).metadata == ({"row": 0}, {"row": 1})


def test_control_characters_that_tokenizers_take_are_left_alone(tmp_path):
    assert PromptDataset.load(write(tmp_path, "p.txt", "a\tb\x0cc\x1b\u2028\n")).prompts[0] == "a\tb\x0cc\x1b"


def test_prompts_are_indexed_from_both_ends_sliced_and_compared_like_a_tuple(tmp_path):
    prompts = PromptDataset.load(write(tmp_path, "p.txt", "a\nb\nc\n")).prompts
    assert (prompts[0], prompts[-1], prompts[1:], prompts[:None]) == ("a", "c", ("b", "c"), ("a", "b", "c"))
    assert prompts != ("a", "b", "d")
    assert prompts != ("a", "b")
    with pytest.raises(IndexError):
        prompts[3]


def test_a_line_is_parsed_when_it_is_asked_for_and_not_kept(tmp_path):
    entry = PromptDataset.load(write(tmp_path, "p.jsonl", '{"prompt": "a", "tags": []}\n')).metadata
    entry[0]["tags"].append("changed")
    assert entry[0] == {"tags": []}


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, reads = write(tmp_path, "p.txt", "a\n"), []
    original = prompts_module.read_bytes
    monkeypatch.setattr(prompts_module, "read_bytes", lambda *args: reads.append(args) or original(*args))
    assert PromptDataset.load(path) is PromptDataset.load(path)
    assert len(reads) == 1
    write(tmp_path, "p.txt", "another\n")
    assert PromptDataset.load(path).prompts == ("another",)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ConfigError, match=r"the prompt file .*p\.txt is not a regular file"):
        PromptDataset.load(str(tmp_path / "p.txt"))


def test_a_file_larger_than_the_limit_names_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_GRPO_MAX_PROMPTS_MIB", "1")
    with pytest.raises(ConfigError, match=r"larger than 1 MiB \(FLOW_GRPO_MAX_PROMPTS_MIB\)"):
        PromptDataset.load(write(tmp_path, "p.txt", "a prompt\n" * 120_000))


@pytest.mark.parametrize("path", ["a\0b.txt", "n" * 300 + ".txt", "~nobody-of-that-name/p.txt"])
def test_a_path_that_cannot_be_is_a_missing_file(path):
    with pytest.raises(ConfigError, match="does not exist"):
        PromptDataset.load(path)


LINES = (
    '{"prompt": "a", "category": "colour", "tag": 1, "weight": 2}\n'
    '{"prompt": "b", "category": "count", "tag": 1}\n{"prompt": "c", "category": "colour", "tag": 2, "weight": 0.5}\n'
)


def test_training_prompts_have_the_weights_or_categories_of_their_lines(config, tmp_path):
    config.prompts.train = write(tmp_path, "p.jsonl", LINES)
    data = training_prompts(config)
    assert (data.weights, data.categories) == (None, None)
    config.sample.prompt_sampling = "weighted"
    assert list(training_prompts(config).weights) == [2.0, 1.0, 0.5]
    config.sample.prompt_sampling = "balanced"
    assert training_prompts(config).categories == [[0, 2], [1]]
    config.sample.prompt_category = "tag"
    assert training_prompts(config).categories == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("sampling", "lines", "message"),
    [
        ("weighted", '{"prompt": "a"}\n', 'has none above 0; it takes "uniform"'),
        ("weighted", '{"prompt": "a", "weight": 0}\n', "has none above 0"),
        (
            "weighted",
            '{"prompt": "a"}\n\n{"prompt": "b", "weight": -1}\n',
            'prompt 2 of .* has the "weight" -1; it takes',
        ),
        ("weighted", '{"prompt": "a", "weight": true}\n', 'the "weight" True'),
        ("weighted", '{"prompt": "a", "weight": Infinity}\n', "is not JSON|Infinity|inf"),
        ("balanced", LINES + '{"prompt": "d"}\n', "prompt 4 of .* has no 'category' that is text"),
        ("balanced", '{"prompt": "a", "category": ["x"]}\n', "prompt 1 of .* has no 'category' that is text"),
    ],
)
def test_lines_that_cannot_be_drawn_so_are_refused(config, tmp_path, sampling, lines, message):
    config.prompts.train, config.sample.prompt_sampling = write(tmp_path, "p.jsonl", lines), sampling
    with pytest.raises(ConfigError, match=message):
        training_prompts(config)


def test_a_prompts_own_negative_is_that_of_every_file_which_is_read(config, tmp_path):
    config.eval_diversity = True
    config.prompts.train = write(
        tmp_path, "train.jsonl", '{"prompt": " a ", "negative_prompt": "x"}\n{"prompt": "b"}\n'
    )
    config.prompts.test = write(tmp_path, "test.txt", "a\n")
    config.prompts.eval_diversity = write(
        tmp_path, "div.jsonl", '{"prompt": "c", "negative_prompt": ""}\n{"prompt": "b", "negative_prompt": null}\n'
    )
    assert own_negatives(config) == {"a": "x", "c": ""}
    config.eval_diversity = False
    assert own_negatives(config) == {"a": "x"}
    config.prompts.test = write(tmp_path, "test.jsonl", '{"prompt": "a", "negative_prompt": "y"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.test = .* has another 'negative_prompt' of 'a'"):
        own_negatives(config)


BAD_FILES = [
    ("p.txt", "", "p.txt is empty"),
    ("p.txt", "\n  \n", "p.txt is empty"),
    ("p.txt", b"fine\nstill fine\n\xff\xfe\n", "line 3 of .*p.txt is not UTF-8"),
    ("p.csv", "a", r"only \.txt and \.jsonl"),
    ("p.jsonl", '{"prompt": "a"}\n\nnot json\n', "line 3 of .*p.jsonl is not JSON"),
    ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'line 2 of .*p.jsonl must be an object whose "prompt"'),
    ("p.jsonl", '{"prompt": " "}\n', "line 1 of"),
    ("p.jsonl", '{"prompt": 3}\n', "line 1 of"),
    ("p.jsonl", '["a"]\n', "line 1 of"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": "half \\ud800"}\n', r"line 2 of .* has \\ud800, half of a surrogate pair"),
    ("p.jsonl", '{"prompt": "a", "\\udfff": 1}\n', r"line 1 of .* has \\udfff"),
    ("p.jsonl", '{"prompt": "a", "tags": ["\\ud83d"]}\n', r"line 1 of .* has \\ud83d"),
    ("p.jsonl", '{"prompt": "a\\u0000b"}\n', "line 1 of .* has a null character"),
    ("p.txt", "fine\na\0 \0c\0", "line 2 of .* has a null character"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 30_000 + "]" * 30_000 + "}\n", "line 1 of .* nested too deep"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 70 + "]" * 70 + "}\n", "line 1 of .* nested more than 64 deep"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "1" * 10_000 + "}\n", "line 1 of .* number of too many digits"),
    ("p.jsonl", '{"prompt": "a", "negative_prompt": 3}\n', "line 1 of .* has a 'negative_prompt' that is no text"),
    (
        "p.jsonl",
        '{"prompt": "a", "negative_prompt": "x"}\n{"prompt": "a"}\n{"prompt": "a", "negative_prompt": "y"}\n',
        "line 3 of .* another 'negative_prompt' than an earlier line of the same prompt",
    ),
    ("p.txt", "a\rb\r\n\rc\n" + "d" * 70_000, r"line 5 of .* longer than 64 KiB \(FLOW_GRPO_MAX_PROMPT_KIB\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_refused_with_the_line_at_fault(tmp_path, name, content, message):
    with pytest.raises(ConfigError, match=message):
        PromptDataset.load(write(tmp_path, name, content))


def test_a_missing_file_is_refused_and_a_fetched_one_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist\.$"):
        PromptDataset.load(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match=r"does not exist; fetch it with `fme prompts --dataset"):
        PromptDataset.load("assets/prompts/pickscore/none.txt")
