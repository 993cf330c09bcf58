"""The draft model's place in memory: beside the other, and first to give way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from app.engine import memory
from app.engine.batch import Row
from app.engine.ledger import line
from app.engine.protocol import ModelRef
from app.engine.residency import Residency
from app.engine.room import Room
from app.engine.speculation import Lanes
from app.errors import GryphonError

logger = logging.getLogger(__name__)


def load_draft(
    lanes: Lanes,
    residency: Residency,
    row: Row,
    ref: ModelRef,
    progress: Callable[[int, int], None],
) -> None:
    """Make the draft model of `row` resident too; the row begins once there is room for both, or
    fails.

    Args:
        progress: Called with bytes done and bytes in all.
    """
    resident, room = residency.model, residency.room
    assert resident is not None and room is not None
    room.hold_draft(None)
    try:
        lanes.load_draft(ref, resident, residency.budget, room.make_way, progress)
    except GryphonError as error:
        memory.release()
        row.fail(error.code, error.message, error.retry_after)
    finally:
        room.hold_draft(lanes.draft)  # the one before, if it was not even tried


def give_up_draft(lanes: Lanes, room: Room, rows: Sequence[Row]) -> bool:
    """Let go of a draft model that none of these rows uses; whether there was one."""
    if lanes.draft is None or any(row.uses_draft for row in rows):
        return False
    logger.info(line("draft unloaded", model=lanes.draft.ref.name))
    lanes.draft = None
    room.hold_draft(None)
    memory.release()
    return True


def admits(lanes: Lanes, room: Room, row: Row, running: Sequence[Row]) -> bool:
    """As `Room.admits`; a draft model that nobody uses gives way to a row."""
    with contextlib.suppress(GryphonError):
        if room.admits(row, running):
            return True
    give_up_draft(lanes, room, [*running, row])
    return room.admits(row, running)
