"""Keyed generators."""

import itertools

import torch

from flow_grpo.randomness import keyed_generator, sample_generators


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
