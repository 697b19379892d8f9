"""Changes of a figure from the base model to a checkpoint, with an interval of the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from flow_grpo.diversity.bootstrap import (
    LEAST_ROWS,
    Jackknife,
    VendiScore,
    Without,
    blocks_of,
    deviations,
    jackknife,
    rows_left,
)
from flow_grpo.diversity.vendi import vendi_of_spectra
from flow_grpo.errors import ConfigError

Array = NDArray[np.float64]
LEVEL = 0.95
DRAWS = 2000  # of the studentised bootstrap
NEIGHBOURS = 5


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
    variance = float(sum(terms))
    half = 0.0
    if variance > 0:  # Welch and Satterthwaite
        freedom = variance**2 / sum(term**2 / free for term, free in zip(terms, freedoms, strict=True))
        half = float(student_t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
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
    half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance)
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


# --- Vendi and reach, from distances --------------------------------------------------------------------


def change_of_vendi(
    old: Sequence[ArrayLike], new: Sequence[ArrayLike], order: float = 1.0, paired: bool = True
) -> Change | None:
    """Of the mean over prompts of Vendi_q of n images, from distance matrices (n, n) of unit features."""
    sets = _matrices([old, new], paired)
    if sets is None or min(map(len, sets[0])) < LEAST_ROWS:
        return None
    score = VendiScore(order)
    parts: list[Jackknife] = []
    values, signs = [], []
    for number, (a, b) in enumerate(zip(*sets, strict=True)):
        rng = np.random.default_rng([0, number])
        kernels = [1 - d**2 / 2 for d in (a, b)]
        found = [float(vendi_of_spectra(np.linalg.eigvalsh(k), order)) for k in kernels]
        values.append(found)
        n = len(a)
        blocks = blocks_of(n, rng)
        withouts = [score.without_rows(k, blocks) for k in kernels]
        if paired:
            both = _difference(*withouts)
            parts.append(jackknife(found[1] - found[0], both, n, len(blocks), rng, log=False))
            signs.append(1.0)
        else:
            for value, without, sign in zip(found, withouts, (-1.0, 1.0), strict=True):
                parts.append(jackknife(value, without, n, len(blocks), rng, log=False))
                signs.append(sign)
    most = float(np.mean([len(a) for a in sets[0]])) - 1
    return _change(values, parts, signs, most, sum(map(len, sets[0])), paired)


def change_of_reach(
    old: Sequence[ArrayLike],
    new: Sequence[ArrayLike],
    old_to_new: Sequence[ArrayLike],
    neighbours: int = NEIGHBOURS,
    paired: bool = True,
) -> Change | None:
    """Of the share of base images that are still reached."""
    sets = _matrices([old, new, old_to_new], paired)
    if sets is None or min(map(len, sets[0])) < LEAST_ROWS + 1:
        return None
    parts: list[Jackknife] = []
    values, signs = [], []
    for number, (a, b, c) in enumerate(zip(*sets, strict=True)):
        rng = np.random.default_rng([0, number])
        n = len(a)
        k = min(neighbours, max(1, n // 3))
        blocks = blocks_of(n, rng)
        own, other = float(reached(a[None], a[None], k)[0]), float(reached(c[None], b[None], k, not paired)[0])
        values.append([own, other])

        def both(
            left_out: np.ndarray,
            n: int = n,
            blocks: np.ndarray = blocks,
            k: int = k,
            a: Array = a,
            b: Array = b,
            c: Array = c,
        ) -> Array:
            rows = rows_left(n, blocks, left_out)
            a, b, c = (x[rows[:, :, None], rows[:, None, :]] for x in (a, b, c))
            return reached(c, b, k) - reached(a, a, k)

        if paired:
            parts.append(jackknife(other - own, both, n, len(blocks), rng, log=False))
            signs.append(1.0)
            continue

        def first(
            left_out: np.ndarray,
            n: int = n,
            blocks: np.ndarray = blocks,
            k: int = k,
            a: Array = a,
            b: Array = b,
            c: Array = c,
        ) -> Array:
            rows = rows_left(n, blocks, left_out)
            a = a[rows[:, :, None], rows[:, None, :]]
            return reached(c[rows], np.broadcast_to(b, (len(rows), n, n)), k, True) - reached(a, a, k)

        def second(
            left_out: np.ndarray, n: int = n, blocks: np.ndarray = blocks, k: int = k, b: Array = b, c: Array = c
        ) -> Array:
            rows = rows_left(n, blocks, left_out)
            return reached(c.T[rows].transpose(0, 2, 1), b[rows[:, :, None], rows[:, None, :]], k, True)

        parts.append(jackknife(other - own, first, n, len(blocks), rng, log=False))
        parts.append(jackknife(other, second, n, len(blocks), rng, log=False))
        signs += [1.0, 1.0]
    return _change(values, parts, signs, 1.0, sum(map(len, sets[0])), paired)


def reached(to_set: np.ndarray, within: np.ndarray, k: int, every: bool = False) -> Array:
    """(b,) shares of images i, (b, m, n) from a set, (b, n, n) within, that lie in a ball of it without image i.

    `every`: of the set without each image e in turn, and the mean over e; i and e are then not the same noise.
    """
    n = within.shape[-1]
    inside = np.where(np.eye(n, dtype=bool), np.inf, within)
    nearest = np.partition(inside, (k - 1, k), axis=-1)
    radius, wider = nearest[..., None, k - 1], nearest[..., None, k]
    radius, wider = np.swapaxes(nearest[..., k - 1 : k], -1, -2), np.swapaxes(nearest[..., k : k + 1], -1, -2)
    near = (inside <= nearest[..., k - 1 : k]).astype(np.float32)  # (b, j, e)
    small = to_set <= radius  # (b, i, j)
    wide = ((to_set <= wider) & ~small).astype(np.float32)
    count = small.sum(-1)
    if every:
        hit = (count[..., None] - small > 0) | (wide @ near > 0)
        return hit.mean((-1, -2))
    own = np.diagonal(small, axis1=-2, axis2=-1)
    return ((count - own > 0) | (np.einsum("bij,bji->bi", wide, near) > 0)).mean(-1)


def _difference(old: Without, new: Without) -> Without:
    return lambda left_out: new(left_out) - old(left_out)


def _change(
    values: Sequence[Sequence[float]],
    parts: Sequence[Jackknife],
    signs: Sequence[float],
    most: float,
    images: int,
    paired: bool,
) -> Change:
    old, new = (float(x) for x in np.mean(values, axis=0))
    rngs = [np.random.default_rng([1, number]) for number in range(len(parts))]
    off = deviations(parts, np.array(signs) / len(values), rngs, DRAWS)
    half = float(np.quantile(np.abs(off), LEVEL))
    difference = new - old
    return Change(
        old, new, difference, max(difference - half, -most), min(difference + half, most), LEVEL, images, paired
    )


def _matrices(sets: Sequence[Sequence[ArrayLike]], paired: bool) -> list[list[Array]] | None:
    """The matrices as float64, cut to equal size unless paired; None where a value is not finite, or there are none."""
    counts = [len(matrices) for matrices in sets]
    if len(set(counts)) > 1:
        raise ConfigError(f"There are distances of {', '.join(map(str, counts))} prompts; the numbers must agree.")
    found = [[np.asarray(matrix, dtype=np.float64) for matrix in matrices] for matrices in sets]
    for prompt, matrices in enumerate(zip(*found, strict=True)):
        sides = {side for matrix in matrices for side in matrix.shape}
        if any(m.ndim != 2 for m in matrices) or (paired and len(sides) > 1):
            shapes = " and ".join(str(m.shape) for m in matrices)
            raise ConfigError(f"The distances of prompt {prompt} have shapes {shapes}; they must be (n, n) alike.")
        n = min(sides)
        for kind, matrix in zip(found, matrices, strict=True):
            kind[prompt] = matrix[:n, :n]
    if not found[0] or not all(np.isfinite(m).all() for kind in found for m in kind):
        return None
    return found
