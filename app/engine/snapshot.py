"""What the engine looks like from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from app.engine import kernels
from app.engine.admission import least_of
from app.engine.batch import Row
from app.engine.protocol import ModelRef, ModelState
from app.engine.residency import Residency


@dataclass(frozen=True)
class Snapshot:
    """What the engine looks like from outside, replaced whole so that any thread may read it."""

    model: ModelRef | None = None
    state: ModelState = "unloaded"
    weight_bytes: int = 0
    state_bytes: int = 0
    prefix_bytes: int = 0
    scratch_bytes: int = 0
    active_bytes: int = 0
    cache_bytes: int = 0
    budget_bytes: int = 0
    running: int = 0
    queued: int = 0
    context_length: int | None = None
    unload_s: float | None = None
    """When the model goes if no request comes, by `time.monotonic`; None for never."""
    note: str = ""


def snapshot_of(
    residency: Residency,
    running: Sequence[Row],
    *,
    queued: int,
    state_bytes: int,
    draft_bytes: int,
) -> Snapshot:
    """The engine between two turns.

    Args:
        running: The rows being prefilled or decoded.
        state_bytes: What their states take.
        draft_bytes: The weights of the draft model.
    """
    model, room, prefixes = residency.model, residency.room, residency.prefixes
    active_bytes, cache_bytes = mx.get_active_memory(), mx.get_cache_memory()
    budget_bytes = residency.budget.now_bytes()
    if model is None or room is None:
        return Snapshot(
            active_bytes=active_bytes,
            cache_bytes=cache_bytes,
            budget_bytes=budget_bytes,
            queued=queued,
        )
    return Snapshot(
        model=model.ref,
        state="ready",
        weight_bytes=model.loaded.nbytes + draft_bytes,
        state_bytes=state_bytes,
        prefix_bytes=prefixes.nbytes if prefixes is not None else 0,
        scratch_bytes=room.scratch_bytes(running),
        active_bytes=active_bytes,
        cache_bytes=cache_bytes,
        budget_bytes=budget_bytes,
        running=len(running),
        queued=queued,
        context_length=least_of(model.loaded.context_length, room.context),
        unload_s=residency.keep_alive.deadline_s,
        note=", ".join([model.note, *kernels.faults()]),
    )
