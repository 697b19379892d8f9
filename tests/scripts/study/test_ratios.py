"""Every form of the ratio trained in the plane."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from scripts.study import ratios
from scripts.study.ratios import PLANE, SETUPS, Trained, main, parse, read, study, train
from scripts.study.testbeds import SEARCH_SEED, SEEDS_OF_CLAIMS


def test_the_transport_term_decides_which_way_the_reward_goes():
    """The claim's answer in small: the same seed, the same exact trace, with the term and without."""
    path, step = (train("gaussian", form, 0, 1e-3, 0, 12) for form in ("ode_path", "ode_step"))
    assert path.gain > 0.1
    assert step.gain < 0
    assert len(path.reward) == 5  # the base's, and every third epoch's
    assert path.reward[0] == step.reward[0] == pytest.approx(0.25, abs=0.05)  # c . mean of the base


@pytest.fixture
def asked(monkeypatch):
    """The jobs that are asked for; the gain of each is its rate, but for `ode_step`, which loses by it."""
    jobs = []

    def trainings(every, args, title):
        jobs.extend(every)
        sign = {"ode_step": -1.0}
        return [Trained(p, f, n, rate, seed, 0.1, [0.0, sign.get(f, 1.0) * rate]) for p, f, n, rate, seed, _ in every]

    monkeypatch.setattr(ratios, "trainings", trainings)
    return jobs


def planned():
    """(problem, form, probes) of all, and of those whose rate is searched."""
    every = [(name, *form) for name, setup in SETUPS.items() for form in setup.forms]
    searched = [(name, *form) for name, setup in SETUPS.items() for form in setup.searched]
    return every, searched


def test_every_form_is_trained_with_five_seeds_at_the_rate_that_another_seed_found(asked):
    every, searched = planned()
    found = study(SimpleNamespace(quick=False, only=[], processes=1))
    assert len(found) == len(asked) == len(every) * len(SEEDS_OF_CLAIMS) + 3 * len(searched)
    for problem, form, _, rate, seed, epochs in asked:
        setup = SETUPS[problem]
        assert epochs == setup.epochs
        if seed != SEARCH_SEED:
            assert rate == (min(setup.rates) if form == "ode_step" else max(setup.rates))


def test_on_images_the_rate_is_searched_with_the_fewest_probes():
    assert SETUPS["images"].searched == [("sde", 1), ("cfm", 5), ("ode_step", 1), ("ode_path", 1)]
    assert SETUPS["gaussian"].searched == list(SETUPS["gaussian"].forms)


def test_quick_runs_have_the_committed_rates_and_seeds_of_their_own(asked):
    study(SimpleNamespace(quick=True, only=["sde-1"], processes=1))
    committed = {one.rate for one in read(ratios.OUT / ratios.RATIOS) if one.form == "sde" and one.problem in PLANE}
    assert {job[3] for job in asked} <= committed
    assert {job[4] for job in asked} == set(ratios.QUICK_SEEDS)
    assert {job[0] for job in asked} == set(PLANE)
    assert not set(ratios.QUICK_SEEDS) & {SEARCH_SEED, *SEEDS_OF_CLAIMS}


def test_what_is_written_is_read_again(tmp_path, asked):
    main(["--only", "gaussian", "sde-1", "cfm-10", "--out", str(tmp_path)])
    found = read(tmp_path / ratios.RATIOS)
    assert {one.form for one in found} == {"sde", "cfm"}
    assert {one.problem for one in found} == {"gaussian"}
    assert found[0].gain == pytest.approx(found[0].rate)


def test_what_only_leaves_out_stays_as_it_was(tmp_path, asked):
    main(["--only", "mixture", "sde-1", "--out", str(tmp_path)])
    main(["--only", "plane", "cfm-10", "--out", str(tmp_path)])
    keys = {one.key for one in read(tmp_path / ratios.RATIOS)}
    assert keys == {("mixture", "sde", 1), ("gaussian", "cfm", 10), ("mixture", "cfm", 10)}


def test_the_committed_runs_are_those_that_are_planned():
    every, searched = planned()
    found = read(ratios.OUT / ratios.RATIOS)
    assert sorted((*one.key, one.seed) for one in found if one.seed != SEARCH_SEED) == sorted(
        (*key, seed) for key in every for seed in SEEDS_OF_CLAIMS
    )
    assert sorted((*one.key, one.rate) for one in found if one.seed == SEARCH_SEED) == sorted(
        (*key, rate) for key in searched for rate in SETUPS[key[0]].rates
    )
    best = ratios.best_rates([one for one in found if one.seed == SEARCH_SEED])
    assert all(one.rate == best[one.key] for one in found if one.seed != SEARCH_SEED)


def test_on_images_every_group_is_of_one_prompt():
    """Two epochs: the reward of the same noises is measured before and after, and only the weights have changed."""
    found = train("images", "sde", 1, 3e-3, 0, 2)
    assert found.reward[0] == pytest.approx(0.523, abs=0.01)  # of a sneaker's images by the base model
    assert len(found.reward) == 2
    assert found.reward[1] != found.reward[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--processes", "0"], "--processes 0 is not allowed"), (["--only", "sde-2"], "invalid choice: 'sde-2'")],
)
def test_what_is_not_allowed_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert words in capsys.readouterr().err


def test_a_reward_that_is_no_number_is_no_gain():
    assert Trained("gaussian", "sde", 1, 1e-3, 0, 0.1, [0.0, float("inf")]).gain == float("-inf")
