"""Keyed generators."""

import itertools

import torch

from flow_grpo.randomness import balanced_stream, keyed_generator, keyed_stream, sample_generators, weighted_stream


def first(generator):
    return torch.randn(8, generator=generator)


def test_the_same_key_draws_the_same_numbers_whatever_was_drawn_before():
    torch.manual_seed(1)
    expected = first(keyed_generator(3, "noise", 1, 2))
    torch.manual_seed(2)
    assert torch.equal(first(keyed_generator(3, "noise", 1, 2)), expected)


def test_every_part_of_the_key_matters():
    keys = [
        (3, "noise", 1, 2),
        (4, "noise", 1, 2),
        (3, "eval", 1, 2),
        (3, "noise", 2, 1),
        (3, "noise", 12),
        (3, "noise"),
    ]
    draws = [first(keyed_generator(*key)) for key in keys]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_neighbouring_keys_are_uncorrelated():
    draws = torch.stack([torch.randn(1000, generator=keyed_generator(0, "noise", i)) for i in range(50)])
    correlation = torch.corrcoef(draws) - torch.eye(50)
    assert correlation.abs().max() < 0.17  # five standard errors of 1,000 draws


def test_an_images_generator_does_not_depend_on_its_neighbours():
    whole = sample_generators(0, "noise", 4, torch.tensor([5, 6, 7]))
    assert torch.equal(first(whole[1]), first(sample_generators(0, "noise", 4, torch.tensor([6]))[0]))


WEIGHTS = [0.3, 4.0, 0.0, 1.1, 1.1, 0.0]


def weighted(count, start=0, weights=WEIGHTS):
    return weighted_stream(weights, 5, "prompts", start, count)


def test_a_weighted_pass_has_each_entrys_share_rounded_up_or_down_and_exactly_on_average():
    passes, size = 3000, len(WEIGHTS)
    counts = torch.stack(
        [torch.bincount(part, minlength=size) for part in torch.tensor(weighted(passes * size)).split(size)]
    )
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) * size / sum(WEIGHTS)
    assert ((counts == shares.floor()) | (counts == shares.ceil())).all()
    fraction = shares - shares.floor()
    error = (fraction * (1 - fraction) / passes).sqrt()  # of a count that is one of two numbers
    assert ((counts.double().mean(0) - shares).abs() <= 4 * error).all()


def test_without_its_random_offset_a_weighted_stream_would_be_biased(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.5, dtype=torch.float64))
    assert 0 not in weighted(3000)  # whose share is 0.28 of a pass


def test_equal_weights_draw_the_stream_without_weights():
    for weight in (1.0, 0.1, 1e308):
        assert weighted(50, 3, [weight] * 7) == keyed_stream(7, 5, "prompts", 3, 50)


def test_a_stream_is_the_same_from_wherever_it_is_begun():
    groups = [[0, 1, 2], [3], [4, 5]]
    for stream in (weighted, lambda count, start=0: balanced_stream(groups, 5, "prompts", start, count)):
        whole = stream(60)
        assert [row for start in range(0, 60, 4) for row in stream(4, start)] == whole


def test_every_member_of_a_group_is_drawn_before_any_again_and_groups_are_independent():
    groups = [list(range(5)), list(range(5, 10)), [10]]
    drawn = balanced_stream(groups, 5, "prompts", 0, 3 * 15)
    first, second = ([row for row in drawn if row in group] for group in groups[:2])
    for part in (first, second):
        assert all(len(set(part[i : i + 5])) == 5 for i in range(0, 15, 5))
    assert [row + 5 for row in first] != second
