"""The race detector against every pair of accesses of random programs."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from .planted.kernels import Small, run

THREADS, PLACES, ROUNDS = 64, 4, 6
NOTHING, LOAD, STORE = range(3)
NO_BARRIER, THREADGROUP_BARRIER, SIMDGROUP_BARRIER, WRONG_BARRIER = range(4)

Ints = npt.NDArray[np.int32]

# Every thread follows its column of a table; a threadgroup shares `barriers`.
THREADGROUP_MEMORY = """
    threadgroup float t[PLACES];
    const uint i = thread_index_in_threadgroup;
    if (i < PLACES) { t[i] = 0.0f; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f;
    for (int r = 0; r < ROUNDS; ++r) {
      const int at = places[r * 64 + i];
      if (ops[r * 64 + i] == 1) { sum += t[at]; }
      if (ops[r * 64 + i] == 2) { t[at] = float(r * 64 + i + 1); }
      if (barriers[r] == 1) { threadgroup_barrier(mem_flags::mem_threadgroup); }
      if (barriers[r] == 2) { simdgroup_barrier(mem_flags::mem_threadgroup); }
      if (barriers[r] == 3) { threadgroup_barrier(mem_flags::mem_device); }
    }
    y[i] = sum;
"""


def program(seed: int) -> tuple[Ints, Ints, Ints]:
    """What each thread does in each round: little, so that many programs have no race."""
    rng = np.random.default_rng(seed)
    shape = (ROUNDS, THREADS)
    busy = rng.random(shape) < rng.choice([0.01, 0.03, 0.1])
    ops = np.where(busy, rng.choice([LOAD, STORE], shape, p=[0.7, 0.3]), NOTHING)
    barriers = rng.choice(4, ROUNDS, p=[0.2, 0.5, 0.2, 0.1])
    return ops.astype(np.int32), rng.integers(0, PLACES, shape).astype(np.int32), barriers


def races(ops: Ints, places: Ints, barriers: Ints) -> set[str]:
    """By looking at all pairs."""
    accesses = [(r, i, ops[r, i], places[r, i]) for r, i in zip(*np.nonzero(ops), strict=True)]
    found = set()
    for (r, i, op, at), (s, j, other, there) in itertools.combinations(accesses, 2):
        if i == j or at != there or STORE not in (op, other):
            continue
        between = set(barriers[r:s])  # rows are in the order of rounds
        same_simdgroup = i // 32 == j // 32
        if THREADGROUP_BARRIER in between:
            continue
        if same_simdgroup and SIMDGROUP_BARRIER in between:
            continue
        found.add("lane-order" if same_simdgroup else "race")
    return found


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_random_programs_race_exactly_when_some_pair_does(schedule: str) -> None:
    outcomes = []
    for seed in range(60):
        ops, places, barriers = program(seed)
        tables = [mx.array(ops), mx.array(places), mx.array(barriers.astype(np.int32))]
        kernel = Small(
            THREADGROUP_MEMORY,
            inputs=lambda tables=tables: tables,
            input_names=["ops", "places", "barriers"],
            template=[("PLACES", PLACES), ("ROUNDS", ROUNDS)],
        )
        _, host = run(kernel, schedules=[schedule])
        want = races(ops, places, barriers)
        # Of several conflicts at one place the host may see one kind only, the worse if there is.
        assert host.kinds <= want and bool(host.kinds) == bool(want), f"program {seed}"
        assert ("race" in host.kinds) == ("race" in want), f"program {seed}"
        outcomes.append(frozenset(want))
    assert len(set(outcomes)) == 4  # none, each alone, both
