"""What changed from the base model to a checkpoint, with 95 % intervals of the difference: reward, judge, Vendi, reach.

Prompts are fixed, images are drawn (as in `bootstrap`). Paired: image i of both models comes from the same noise, and
only differences count. Not paired: two independent sets of images. What gives no interval (a value that is not finite,
too few images) is None.

- Mean: t interval of the stratified mean, variance sum_p (n_p / N)^2 s_p^2 / n_p, degrees of freedom by Welch and
  Satterthwaite (Biometrika 34, 28). Not paired, each prompt of either model is a stratum.
- Share: Agresti and Min (Statistics in Medicine 24, 729), half an image more in each cell of the 2 x 2 table; not
  paired, Agresti and Caffo (The American Statistician 54, 280). Prompts are no strata here, which makes it no narrower.
  The difference is the plain one; the interval is the adjusted one, made to hold it and cut at -1 and 1.
- Vendi: the jackknife, its correction for interactions and the studentised bootstrap of `bootstrap`, of the difference
  itself and not of its logarithm: noise i is left out of both models. Not paired, the parts of both models add up. The
  interval is widened by n / (n - 1), without which it covered in 92 to 94 % where n is 8, and where 16 images of one
  prompt are diffuse.
- Reach, the base's images that are still reached. Image i of the base is reached by a set S if it lies in the ball of
  some x_j of S, j != i; balls reach to the k-th nearest neighbour within S without x_i. S is the base's own images, or
  the checkpoint's. Since i is left out of both, an equal model has the same expected reach as the base, and not less.
  Not paired, each member of S is left out in turn, and the mean taken.

  k is min(`neighbours`, max(1, n // 3)). Of n = 16 images the base reaches, with k = 1, 2, 3, 5:

      4 balanced modes         64, 88, 97, 100 %      3 modes of 70, 20 and 10 %   60, 82, 91, 97 %
      diffuse in 32 dimensions 65, 90, 97, 100 %      the tiny model               68, 88, 93, 97 %

  and with k = 2 much the same of 8 (79 to 94 %) and of 64 (72 to 92 %). k = 2 leaves room to fall, and its balls do not
  join modes of which few images remain.

  A count of neighbours is no smooth function: leaving out x_l also changes which other balls are wide. The jackknife
  counts each of these interactions several times, and its interval was twice too wide. With d_i the change of image i
  (-1, 0 or 1), e_li what leaving out x_l does to d_i, less its mean over l, and E_l = sum_i e_li, less its mean,

      V = s_d^2 / n + max(0, W) + 1 / (N + 2)^2,      W = sum_l (E_l^2 - sum_i e_li^2) / (n (n - 1))

  for one prompt; with more, those of the mean over prompts. First come the images, as if independent. W is what a
  member does to several images at once, without the noise that each alone brings. The last part is that of half an
  image gained and half an image lost, for equal counts are no certainty. The covariance of d_l with E_l is left out:
  with it, equal models that share most of their noise were covered in 77 to 89 % (rho = 0.95).

Coverage of the 95 % intervals, by `scripts/bench/verdicts.py` (assets/figures/verdicts): 200 repeats, 2,000 of reward
and judge, with seeds used for nothing else. V and the widening of Vendi's interval were chosen by coverage with others.

                least, mean, most of all situations    equal models whose interval excludes 0, at most (below it)
    Vendi            92.5, 96.9, 99.5 %  (47)                         5.5 % (3.5 %)
    reach            90.0, 96.5, 99.5 %  (47)                         6.0 % (3.0 %)
    reward           94.5, 94.8, 96.5 %  (25)                         5.6 % (3.2 %)
    judge            89.8, 95.6, 100 %   (25)                         5.3 % (2.8 %)

The standard error is 1.5 %, of the last two 0.5 %. What falls short: reach where nearly all images move to one mode of
four (90.0 to 93.5 %), and the judge of 80 images that were all right and are now 95 % right (89.8 %; of 160, 95 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flow_grpo.diversity.bootstrap import (
    LEAST_ROWS,
    STACK_BYTES,
    Jackknife,
    VendiScore,
    blocks_of,
    deviations,
    jackknife,
    rows_left,
)
from flow_grpo.diversity.vendi import NEGLIGIBLE
from flow_grpo.errors import ConfigError
from flow_grpo.statistics import LEVEL, half_width, normal_half_width, satterthwaite

Array = NDArray[np.float64]
Matrices = Sequence[ArrayLike] | np.ndarray  # one for each prompt
DRAWS = 2000  # of the studentised bootstrap
NEIGHBOURS = 2  # of 16 images the base then reaches 78 to 93 % of its own, see above
ROUNDING = 1.5  # eigenvalues below so many times the most negative one are rounding, as that one is
INDEFINITE = 1e-5  # a negative one beyond this share is none


@dataclass(frozen=True)
class Change:
    """A figure of the base and of a checkpoint, and the interval at `level` of their difference, new - old."""

    old: float
    new: float
    difference: float
    low: float
    high: float
    level: float = LEVEL
    images: int = 0  # of each of the two models
    paired: bool = True  # image i of both models comes from the same noise


# --- means and shares ---------------------------------------------------------------------------------


def change_of_means(old: ArrayLike, new: ArrayLike, groups: ArrayLike, paired: bool = True) -> Change | None:
    """Of the mean over images, (N,) each, stratified by `groups` (N,), the images' prompts."""
    a, b, group = _columns(old, new), _columns(new, old), np.asarray(groups)
    if group.shape != a.shape:
        raise ConfigError(f"groups has shape {group.shape}; it must be {a.shape}, one group for each image.")
    if not np.isfinite([a, b]).all() or len(a) < 2:
        return None
    strata = _strata(group)
    sides = [b - a] if paired else [a, b]
    terms = [(len(rows) / len(a)) ** 2 * side[rows].var(ddof=1) / len(rows) for side in sides for rows in strata]
    freedoms = [len(rows) - 1 for _ in sides for rows in strata]
    half = half_width(math.sqrt(sum(terms)), satterthwaite(terms, freedoms))
    difference = float(b.mean() - a.mean())
    return Change(
        float(a.mean()), float(b.mean()), difference, difference - half, difference + half, LEVEL, len(a), paired
    )


def change_of_shares(old: ArrayLike, new: ArrayLike, paired: bool = True) -> Change | None:
    """Of the share of images that are right, (N,) of 0 and 1 each."""
    a, b = _columns(old, new), _columns(new, old)
    if not np.isfinite([a, b]).all() or len(a) == 0:
        return None
    n, difference = len(a), float(b.mean() - a.mean())
    if paired:  # Agresti and Min: half an image more in each cell of the table of two by two
        gained, lost = float((b > a).sum()) + 0.5, float((b < a).sum()) + 0.5
        centre = (gained - lost) / (n + 2)
        variance = ((gained + lost) / (n + 2) - centre**2) / (n + 2)
    else:  # Agresti and Caffo: one right and one wrong image more on either side
        p, q = (a.sum() + 1) / (n + 2), (b.sum() + 1) / (n + 2)
        centre, variance = float(q - p), float(p * (1 - p) + q * (1 - q)) / (n + 2)
    half = normal_half_width(math.sqrt(variance))
    low, high = max(min(centre - half, difference), -1.0), min(max(centre + half, difference), 1.0)
    return Change(float(a.mean()), float(b.mean()), difference, low, high, LEVEL, n, paired)


def _columns(values: ArrayLike, other: ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != np.shape(other):
        raise ConfigError(f"old and new have shapes {x.shape} and {np.shape(other)}; they must be (N,) alike.")
    return x


def _strata(groups: np.ndarray) -> list[np.ndarray]:
    """The rows of each group; groups of one image together, for their variance cannot be told alone."""
    strata = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    single = [rows for rows in strata if len(rows) == 1]
    strata = [rows for rows in strata if len(rows) > 1]
    if len(single) == 1 and strata:
        single.append(strata.pop(int(np.argmin([len(rows) for rows in strata]))))
    return [*strata, np.concatenate(single)] if single else strata


# --- Vendi, from distances ----------------------------------------------------------------------------------


def change_of_vendi(old: Matrices, new: Matrices, order: float = 1.0, paired: bool = True) -> Change | None:
    """Of the mean over prompts (fixed) of Vendi_q of n images, cosine kernel.

    Args:
        old, new: for each prompt the (n, n) Euclidean distances of the images' unit features.
        order: q, as `vendi_score` takes it.
        paired: image i of both comes from the same noise; else the first min(n) images of either are taken.

    Returns:
        None without prompts, where a prompt has fewer than 4 images, or where a distance is not finite.

    Raises:
        ConfigError: for matrices whose shapes disagree, or that are no distances of unit features.
    """
    sets = _matrices([old, new], paired)
    if sets is None or min(map(len, sets[0])) < LEAST_ROWS:
        return None
    score, found = VendiScore(order), []
    for number, (a, b) in enumerate(zip(*sets, strict=True)):
        found.append(_vendi(score, [_features(a), _features(b)], np.random.default_rng([0, number]), paired))
    parts = [(share / len(found), part) for one in found for share, part in one.parts]
    rngs = [np.random.default_rng([1, number]) for number in range(len(parts))]
    off = deviations([part for _, part in parts], [share for share, _ in parts], rngs, DRAWS)
    before, after = (float(np.mean([getattr(one, side) for one in found])) for side in ("old", "new"))
    images = sum(len(matrix) for matrix in sets[0])
    most = images / len(found) - 1
    half = float(np.quantile(np.abs(off), LEVEL)) * (most + 1) / most
    return _change(before, after, half, most, images, paired)


@dataclass(frozen=True)
class _Vendi:
    """Both scores of a prompt, and the independent parts of their difference's spread with their shares."""

    old: float
    new: float
    parts: list[tuple[float, Jackknife]]


def _vendi(score: VendiScore, features: Sequence[Array], rng: np.random.Generator, paired: bool) -> _Vendi:
    n, (old, new) = len(features[0]), (score(x) for x in features)
    blocks = blocks_of(n, rng)
    before, after = (score.without(x, blocks) for x in features)
    if paired:
        both = jackknife(new - old, lambda left_out: after(left_out) - before(left_out), n, len(blocks), rng, log=False)
        return _Vendi(old, new, [(1.0, both)])
    parts = [jackknife(v, w, n, len(blocks), rng, log=False) for v, w in ((old, before), (new, after))]
    return _Vendi(old, new, [(-1.0, parts[0]), (1.0, parts[1])])


def _features(distances: Array) -> Array:
    """(n, r) unit rows with these distances: their cosines are 1 - d^2 / 2 (classical scaling, not centred)."""
    eigenvalues, vectors = np.linalg.eigh(1 - distances**2 / 2)
    shares = eigenvalues / len(distances)
    if shares[0] < -INDEFINITE:
        raise ConfigError(
            f"The distances are none of unit features: their cosines have an eigenvalue of {shares[0]:.2g} n, and it "
            f"must be at least {-INDEFINITE:g} n."
        )
    kept = shares > max(NEGLIGIBLE * shares[-1], -ROUNDING * shares[0])
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


# --- reach, from distances -----------------------------------------------------------------------------------


def change_of_reach(
    old: Matrices,
    new: Matrices,
    old_to_new: Matrices,
    neighbours: int = NEIGHBOURS,
    paired: bool = True,
) -> Change | None:
    """Of the mean over prompts (fixed) of the share of the base's images that are reached, see the top of this file.

    `old` is what the base reaches of itself, `new` what the checkpoint reaches of the base.

    Args:
        old, new: for each prompt the (n, n) distances within the base's and within the checkpoint's images.
        old_to_new: (n, n), rows base images.
        neighbours: k, but no more than a third of the images of a prompt, and at least 1.
        paired: image i of both comes from the same noise; else the first min(n) images of either are taken.

    Returns:
        None without prompts, where a prompt has fewer than 5 images, or where a distance is not finite.

    Raises:
        ConfigError: for matrices whose shapes disagree, and for neighbours below 1.
    """
    if neighbours < 1:
        raise ConfigError(f"neighbours is {neighbours}; it must be at least 1.")
    sets = _matrices([old, new, old_to_new], paired)
    if sets is None or min(map(len, sets[0])) <= LEAST_ROWS:
        return None
    found = []
    for number, (a, b, c) in enumerate(zip(*sets, strict=True)):
        k = min(neighbours, max(1, len(a) // 3))
        found.append(_reach(a, b, c, k, blocks_of(len(a), np.random.default_rng([0, number])), paired))
    images = sum(len(matrix) for matrix in sets[0])
    points, members = (sum(getattr(one, name) for one in found) / len(found) ** 2 for name in ("points", "members"))
    variance = points + max(members, 0.0) + 1 / (images + 2) ** 2
    half = half_width(math.sqrt(variance), images - len(found))
    before, after = (float(np.mean([getattr(one, side) for one in found])) for side in ("old", "new"))
    return _change(before, after, half, 1.0, images, paired)


def reached(to_set: Array, within: Array, k: int, independent: bool = False) -> Array:
    """Which images a set reaches: (..., m), 0 or 1.

    Args:
        to_set: (..., m, n) distances of m images to the n of the set. Image i and member i belong together: member i
            is left out for image i.
        within: (..., n, n) distances within the set.
        k: a member's ball reaches its k-th nearest other member, of those not left out; n >= k + 2.
        independent: images and members do not belong together. Each member is left out in turn, which keeps the size
            of the set, and the result is the mean, between 0 and 1.
    """
    inside = np.where(np.eye(within.shape[-1], dtype=bool), np.inf, within)
    nearest = np.partition(inside, (k - 1, k), axis=-1)[..., k - 1 : k + 1]  # (..., n, 2)
    radius, wider = nearest[..., None, :, 0], nearest[..., None, :, 1]  # wider: of the ball without a near member
    near = inside <= nearest[..., :1]  # (..., j, e): e is among the k nearest of j
    small = to_set <= radius  # (..., i, j)
    wide = (to_set <= wider) & ~small
    count = small.sum(-1)
    if not independent:
        by_others = count > np.diagonal(small, axis1=-2, axis2=-1)
        return (by_others | (wide & near.swapaxes(-1, -2)).any(-1)).astype(np.float64)
    widened = wide.astype(np.float32) @ near.astype(np.float32) > 0  # (..., i, e): some ball that grows without e
    return ((count[..., None] > small) | widened).mean(-1)


@dataclass(frozen=True)
class _Reach:
    """Both shares of a prompt, and the two parts of the variance of their difference."""

    old: float
    new: float
    points: float
    members: float


def _reach(a: Array, b: Array, c: Array, k: int, blocks: np.ndarray, paired: bool) -> _Reach:
    """Distances within the base (n, n), within the checkpoint, from the base's to the checkpoint's."""
    n, old, new = len(a), reached(a, a, k), reached(c, b, k, not paired)
    change, one = new - old, np.arange(len(blocks))[:, None]
    effects = np.zeros((2, len(blocks), n))  # of blocks of the base's images, and of the checkpoint's where apart
    step = max(1, STACK_BYTES // (8 * n**2))
    for part in (slice(start, start + step) for start in range(0, len(blocks), step)):
        rows = rows_left(n, blocks, one[part])  # (blocks, rows)
        square = rows[:, :, None], rows[:, None, :]
        left = reached(c[square], b[square], k) if paired else new[rows]
        np.put_along_axis(effects[0, part], rows, change[rows] - (left - reached(a[square], a[square], k)), axis=1)
        if not paired:
            columns = np.swapaxes(c.T[rows], 1, 2)  # (blocks, n, rows)
            effects[1, part] = new - reached(columns, b[square], k, independent=True)
    outside = np.ones((len(blocks), n), dtype=bool)
    np.put_along_axis(outside, blocks, False, axis=1)
    members = _members(effects[0], outside, n) + (0 if paired else _members(effects[1], np.ones_like(outside), n))
    return _Reach(float(old.mean()), float(new.mean()), float(change.var(ddof=1)) / n, members)


def _members(effects: Array, counted: np.ndarray, n: int) -> float:
    """W: the variance that members of a set bring, from (blocks, n) effects of leaving them out on each image."""
    centred = np.where(counted, effects - effects.sum(0) / counted.sum(0), 0.0)
    total = centred.sum(1)
    squares = float(((total - total.mean()) ** 2).sum() - (centred**2).sum())
    number = len(effects)
    return squares * (number - 1) / number / (n - n / number) ** 2


# --- both -----------------------------------------------------------------------------------------------------


def _change(old: float, new: float, half: float, most: float, images: int, paired: bool) -> Change:
    """The interval of the difference +- half, which cannot leave +- most."""
    difference = new - old
    low, high = max(difference - half, -most), min(difference + half, most)
    return Change(old, new, difference, low, high, LEVEL, images, paired)


def _matrices(sets: Sequence[Matrices], paired: bool) -> list[list[Array]] | None:
    """As float64, cut to one size for each prompt unless paired; None if there is none, or not all are finite."""
    counts = [len(matrices) for matrices in sets]
    if len(set(counts)) > 1:
        raise ConfigError(f"There are distances of {', '.join(map(str, counts))} prompts; the numbers must agree.")
    prompts = [[np.asarray(m, dtype=np.float64) for m in matrices] for matrices in zip(*sets, strict=True)]
    for number, matrices in enumerate(prompts):
        _check_shapes(matrices, number, paired)
    if not prompts or not all(np.isfinite(m).all() for matrices in prompts for m in matrices):
        return None
    sizes = [min(side for m in matrices for side in m.shape) for matrices in prompts]
    cut = [[m[:n, :n] for m in matrices] for matrices, n in zip(prompts, sizes, strict=True)]
    return [list(kind) for kind in zip(*cut, strict=True)]


def _check_shapes(matrices: Sequence[Array], prompt: int, paired: bool) -> None:
    """(n, n), (m, m) and, if it is there, (n, m); n = m if paired."""
    shapes = [matrix.shape for matrix in matrices]
    n, m = shapes[0][:1], shapes[1][:1]
    if shapes != [n + n, m + m, n + m][: len(shapes)] or (paired and n != m):
        wanted = "(n, n) alike" if paired else "(n, n), (m, m) and (n, m)"
        raise ConfigError(f"The distances of prompt {prompt} have shapes {shapes}; they must be {wanted}.")
