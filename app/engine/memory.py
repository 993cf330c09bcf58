"""What the engine may hold in all, and what a model needs of that before MLX opens its files."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from app import machine
from app.errors import GryphonError
from app.machine import RESERVE_BYTES, binary_bytes
from mlxmodels import footprint as footprints
from mlxmodels.footprint import MIN_CHUNK, MIN_CONTEXT, Footprint

# A look at the machine takes a tenth of a millisecond: too much for every token, not for this.
_LOOK_EVERY_S = 0.25


class MemoryBudget:
    """Bytes for weights, states, prefix cache and scratch together.

    On an Apple GPU its working set, elsewhere the memory of the machine or of the cgroup, less a
    reserve. What other programs leave free may be less than that; it counts whatever this process
    takes beyond its own accounts, too.

    Args:
        cap_bytes: Nothing more than this, however large the machine is; None for no such limit.
    """

    def __init__(self, cap_bytes: int | None = None) -> None:
        self._cap = cap_bytes
        self._looked_s = -math.inf
        self._limit = 0
        self._reachable = 0

    @property
    def limit_bytes(self) -> int:
        """The budget if nothing else ran on this machine."""
        self._look()
        return self._limit

    def now_bytes(self, *, for_running: bool = False) -> int:
        """The budget now, what is held already included.

        Args:
            for_running: For rows that run already, which may use up half of the reserve.
        """
        self._look()
        reserve = RESERVE_BYTES // 2 if for_running else RESERVE_BYTES
        return max(0, min(self._limit, self._reachable - reserve))

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        held = mx.get_active_memory() + mx.get_cache_memory()
        self._reachable = held + machine.system_memory().free_bytes
        limit = max(0, device_bytes() - RESERVE_BYTES)
        self._limit = limit if self._cap is None else min(limit, self._cap)


def device_bytes() -> int:
    """What the default device has for one process, before any reserve."""
    total = machine.system_memory().total_bytes
    if on_gpu():
        total = min(total, int(mx.device_info().get("max_recommended_working_set_size") or total))
    return total


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return mx.default_device() == mx.Device(mx.DeviceType.gpu)


@dataclass(frozen=True)
class LoadPlan:
    """How a model will be held in memory.

    Attributes:
        footprint: What it will take.
        dtype: The dtype everything is expanded to; None keeps what is stored.
        note: What a person should know about the choice.
    """

    footprint: Footprint
    dtype: mx.Dtype | None
    note: str


def plan_load(path: Path, budget: MemoryBudget, *, beside_bytes: int = 0) -> LoadPlan:
    """Choose how to hold a model, or refuse it. What is resident now counts as gone by then.

    Args:
        beside_bytes: What of that stays all the same.

    Raises:
        GryphonError: "does_not_fit", with the arithmetic.
        ModelError: its config or the weights' headers cannot be read.
    """
    available = max(0, budget.now_bytes() - beside_bytes)
    held, expanded = footprints.as_held(path, available, on_gpu=on_gpu())
    if held.least_bytes <= available:
        if expanded is not None:
            note = (
                "slow: weights as stored, because float32 needs "
                f"{binary_bytes(expanded.least_bytes)} and {binary_bytes(available)} is available"
            )
        else:
            note = "weights as stored" if on_gpu() else "float32"
        is_expanded = not on_gpu() and expanded is None
        return LoadPlan(held, mx.float32 if is_expanded else None, note)
    raise GryphonError(
        "does_not_fit",
        f"{path.name} does not fit: {arithmetic(held)}; "
        f"{binary_bytes(available)} is available ({binary_bytes(RESERVE_BYTES)} is left to "
        "everything else). Close other programs, or use a smaller or more quantized build.",
    )


def arithmetic(model: Footprint) -> str:
    """The least that a model takes, term by term."""
    state = model.state_bytes(MIN_CONTEXT)
    scratch = model.row_bytes(MIN_CHUNK, MIN_CONTEXT) - state
    return (
        f"its weights take {binary_bytes(model.weight_bytes)}, a context of {MIN_CONTEXT} tokens "
        f"{binary_bytes(state)} and computing {binary_bytes(scratch)}"
    )


def measured(planned: Footprint, model: Any, states: list[Any]) -> Footprint:
    """A footprint with the states that a model has after one token.

    Args:
        model: It, loaded.
        states: Empty ones of its own making; used up.
    """
    model(mx.zeros((1, 1), mx.int32), cache=states)
    mx.eval([state.state for state in states])
    return footprints.of_states(planned, states)


def limit_mlx(model: Footprint, chunk: int) -> None:
    """Keep MLX's own hoard of freed buffers to what one call takes, and all within the device."""
    mx.set_memory_limit(max(device_bytes() - RESERVE_BYTES // 2, RESERVE_BYTES))
    mx.set_cache_limit(model.scratch_bytes(chunk, 8 * chunk))


def release() -> None:
    """Give back to the system what nothing refers to any more."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        # Arrays of up to 32 MiB come from malloc's heap, which keeps what is freed inside it.
        ctypes.CDLL(None).malloc_trim(0)
