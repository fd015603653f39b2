"""The algorithms behind the tasks, exact and in numpy: sums of k entries or of subsets, tours, increasing and common runs.

Numbers are non-negative and at most `LARGEST`, so that sums of a list fit int64.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

Values = Sequence[int]
Sizes = tuple[int, ...]
LARGEST = 10**9


def modes(values: Values) -> list[int]:
    """The most frequent values, in order of their first places."""
    counts = Counter(values)
    most = max(counts.values())
    return [value for value, count in counts.items() if count == most]


# Sums of some entries


@functools.lru_cache(maxsize=256)
def combinations(n: int, k: int) -> Int64[np.ndarray, "count k"]:
    """All choices of k of n places, lexicographically."""
    return np.array(list(itertools.combinations(range(n), k)), np.int64).reshape(-1, k)


def sums(values: Values, sizes: Sizes) -> Int64[np.ndarray, "choices"]:
    """The sum of every choice of as many entries as one of `sizes` says; sizes in their order, each lexicographically."""
    array = np.asarray(values, np.int64)
    return np.concatenate([array[combinations(len(array), k)].sum(axis=1) for k in sizes])


def chosen(values: Values, sizes: Sizes, number: int) -> list[int]:
    """The entries of the choice that stands at place `number` of `sums`."""
    for k in sizes:
        places = combinations(len(values), k)
        if number < len(places):
            return [values[i] for i in places[number].tolist()]
        number -= len(places)
    raise IndexError(number)


def counted(numbers: Int64[np.ndarray, "_"]) -> tuple[Int64[np.ndarray, "distinct"], Int64[np.ndarray, "distinct"]]:
    """(distinct numbers, ascending; how often each occurs)."""
    if numbers.size and numbers.max() < 4 * numbers.size + 200_000:
        counts = np.bincount(numbers)
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    return np.unique(numbers, return_counts=True)


def subset_sums(values: Values) -> Int64[np.ndarray, "subsets"]:
    """The sum of every subset; bit i of a place says whether entry i is in it."""
    made = np.zeros(1, np.int64)
    for value in values:
        made = np.concatenate([made, made + value])
    return made


def unique_sums(values: Values, sizes: Sizes) -> Int64[np.ndarray, "distinct"]:
    """The sums that exactly one choice of these sizes has, ascending."""
    distinct, counts = counted(sums(values, sizes))
    return distinct[counts == 1]


def unique_subset_sums(values: Values, sizes: Sizes) -> Int64[np.ndarray, "distinct"]:
    """The sums that exactly one non-empty subset of any size has, if that one has one of these sizes; ascending."""
    distinct, counts = counted(subset_sums(values)[1:])
    return np.intersect1d(distinct[counts == 1], sums(values, sizes))


def intervals(values: Values, sizes: Sizes, *, unique: bool) -> list[tuple[int, int]]:
    """Open intervals (s_{m-1}, s_{m+1}) about the sums s_m that are neither the least nor the greatest.

    Args:
        unique: only those about sums that one choice alone has.
    """
    distinct, counts = counted(sums(values, sizes))
    inner = np.arange(1, len(distinct) - 1)
    if unique:
        inner = inner[counts[inner] == 1]
    return list(zip(distinct[inner - 1].tolist(), distinct[inner + 1].tolist(), strict=True))


def first_choice(values: Values, sizes: Sizes, fits: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    """The first choice whose sum fits.

    Raises:
        ValueError: none does.
    """
    places = np.flatnonzero(fits(sums(values, sizes)))
    if not places.size:
        raise ValueError(f"{list(values)}: no choice of {' or '.join(map(str, sizes))} numbers has such a sum.")
    return chosen(values, sizes, int(places[0]))


def subset_of_sum(values: Values, target: int) -> list[int]:
    """The first non-empty subset with this sum.

    Raises:
        ValueError: there is none.
    """
    places = np.flatnonzero(subset_sums(values)[1:] == target) + 1
    if not places.size:
        raise ValueError(f"{list(values)}: no subset has the sum {target}.")
    return [value for i, value in enumerate(values) if places[0] >> i & 1]


def multiples(values: Values, sizes: Sizes, of: int = 10) -> int:
    """How many choices of these sizes have a sum divisible by `of`; by counting residues, choices are not listed."""
    counts = [[0] * of for _ in range(max(sizes) + 1)]  # [entries chosen, residue]
    counts[0][0] = 1
    for seen, value in enumerate(values):
        step = value % of
        for size in range(min(seen, max(sizes) - 1), -1, -1):
            row = counts[size]
            counts[size + 1] = [
                a + b for a, b in zip(counts[size + 1], row[of - step :] + row[: of - step], strict=True)
            ]
    return sum(counts[size][0] for size in sizes)


# Tours


@functools.lru_cache(maxsize=16)
def _layers(cities: int) -> list[list[tuple[int, np.ndarray]]]:
    """For each size from 2 on: (last city, the sets of that many cities with it), sets as bits."""
    masks = np.arange(1 << cities)
    size = np.array([mask.bit_count() for mask in range(1 << cities)])
    return [[(j, masks[(size == s) & (masks >> j & 1 == 1)]) for j in range(cities)] for s in range(2, cities + 1)]


def shortest_tour(matrix: Sequence[Values]) -> tuple[list[int], int, int]:
    """(a shortest tour from city 0 back to it, its length, how many sequences are as short), by Held and Karp's programme."""
    distance = np.asarray(matrix, np.int64)
    others = len(distance) - 1
    far = np.int64(2**60)
    cost, ways = np.full((1 << others, others), far), np.zeros((1 << others, others), np.int64)
    alone = np.arange(others)
    cost[1 << alone, alone], ways[1 << alone, alone] = distance[0, 1:], 1
    for layer in _layers(others):
        for last, sets in layer:
            before = sets ^ (1 << last)
            through = cost[before] + distance[1:, last + 1]
            best = through.min(axis=1)
            cost[sets, last] = best
            ways[sets, last] = np.where(through == best[:, None], ways[before], 0).sum(axis=1)
    back = cost[-1] + distance[1:, 0]
    length = int(back.min())
    tour, visited = [0, int(back.argmin()) + 1], (1 << others) - 1
    while visited ^ 1 << tour[-1] - 1:
        visited ^= 1 << tour[-1] - 1
        tour.append(int((cost[visited] + distance[1:, tour[-1]]).argmin()) + 1)
    return [*tour, 0], length, int(ways[-1][back == length].sum())


def tour_length(matrix: Sequence[Values], tour: Sequence[int]) -> int:
    """The sum of the distances along a tour."""
    return sum(int(matrix[a][b]) for a, b in itertools.pairwise(tour))


# Runs


def longest_increasing(values: Values) -> list[int]:
    """A longest strictly increasing subsequence: of these, one whose ends are as small as they can be, by patience sorting."""
    ends: list[int] = []
    places: list[int] = []
    before: list[int] = []
    for i, value in enumerate(values):
        at = bisect.bisect_left(ends, value)
        before.append(places[at - 1] if at else -1)
        ends[at:] = [value, *ends[at + 1 :]]
        places[at:] = [i, *places[at + 1 :]]
    found, i = [], places[-1]
    while i >= 0:
        found.append(values[i])
        i = before[i]
    return found[::-1]


def is_subsequence(part: Values, values: Values) -> bool:
    """Whether the entries of `part` occur in `values` in this order."""
    left = iter(values)
    return all(value in left for value in part)


def longest_consecutive(values: Values) -> list[int]:
    """The longest run of consecutive numbers that all occur, ascending; of several, the lowest."""
    there = set(values)
    best: range = range(0)
    for start in sorted(value for value in there if value - 1 not in there):
        end = start + 1
        while end in there:
            end += 1
        best = max(best, range(start, end), key=len)  # the first of equals
    return list(best)


def common_blocks(one: Values, other: Values) -> list[tuple[int, ...]]:
    """The distinct longest contiguous blocks that both lists have; [()] where they share no number."""
    second = np.asarray(other, np.int64)
    run, best = np.zeros(len(second), np.int64), 0
    found: set[tuple[int, ...]] = {()}
    for i, value in enumerate(one):
        run = np.where(second == value, np.concatenate([[0], run[:-1]]) + 1, 0)
        longest = int(run.max(initial=0))
        if longest > best:
            best, found = longest, set()
        if longest == best and best:
            found.add(tuple(one[i - best + 1 : i + 1]))
    return sorted(found)
