"""The model in memory with all that belongs to it: the account of its memory, what is kept of
earlier prompts and answers, and how long it stays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from app.engine import memory
from app.engine.admission import PREFILL_CHUNK
from app.engine.batch import Row
from app.engine.keep_alive import KeepAlive
from app.engine.ledger import line
from app.engine.prefix_cache import PrefixCache
from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import ModelRef
from app.engine.resident import ResidentModel, load_resident, plan_resident
from app.engine.room import Room
from app.engine.spill import Spill
from app.engine.state_leaves import can_keep
from app.errors import GryphonError

logger = logging.getLogger(__name__)

_MAX_PREFIX_BYTES = 2 * 1024**3
# What an unload waits for what is kept to go to the disk.
_SAVE_S = 2.0


class Residency:
    """One model at a time. Used by the thread that owns MLX.

    Args:
        prefix_cache_bytes: Memory for states kept for later requests, 0 keeps none; None takes a
            tenth of what is available once a model is loaded, at most 2 GiB.
        prefix_files: Where they are kept over a restart; None for nowhere.
        memory_bytes: Caps the memory budget; None is what the machine has.
        keep_alive_s: How long a model stays after its last request; negative or infinite: for ever.
    """

    def __init__(
        self,
        prefix_cache_bytes: int | None,
        prefix_files: PrefixFiles | None,
        memory_bytes: int | None,
        keep_alive_s: float,
    ) -> None:
        self.model: ResidentModel | None = None
        self.room: Room | None = None
        self.prefixes: PrefixCache | None = None
        """None where nothing may be kept."""
        self.budget = memory.MemoryBudget(memory_bytes)
        self.keep_alive = KeepAlive(keep_alive_s)
        self.loads = 0
        """Models made resident so far; any thread may read it."""
        self._prefix_cache_bytes = prefix_cache_bytes
        self._prefix_files = prefix_files

    def load(
        self, ref: ModelRef, unload: Callable[[], None], progress: Callable[[int, int], None]
    ) -> float:
        """Make a model resident in place of the one that is; the seconds that took.

        Args:
            unload: Called once it is known that the model fits: what is loaded stays until then.
            progress: Called with bytes done and bytes in all.

        Raises:
            GryphonError: as `plan_resident` and `load_resident`.
        """
        started = time.monotonic()
        try:
            plan = plan_resident(ref, self.budget)
            unload()
            model = load_resident(ref, plan, progress)
        except GryphonError as error:
            memory.release()
            logger.info(line("load failed", model=ref.name, code=error.code))
            raise
        self.model = model
        self.loads += 1
        load_s, held = time.monotonic() - started, model.loaded.nbytes
        logger.info(line("loaded", model=ref.name, seconds=load_s, weight_bytes=held))
        chunk = PREFILL_CHUNK[mx.default_device().type]
        memory.limit_mlx(model.footprint, chunk)
        self.prefixes = self.new_prefix_cache(model)
        self.room = Room(self.budget, model.footprint, ref.name, held, self.prefixes, chunk)
        return load_s

    def unload(self) -> None:
        """Save what was kept for the model, forget both, and give the memory back; nothing else may
        refer to the model any more."""
        self.save(_SAVE_S)
        if self.model is not None:
            logger.info(line("unloaded", model=self.model.ref.name))
        self.model = self.room = self.prefixes = None
        memory.release()

    def new_prefix_cache(self, model: ResidentModel) -> PrefixCache | None:
        """What is to keep a model's states; None where nothing may be kept."""
        # A rotary base that depends on a prompt's length makes every state depend on it too: what
        # a prefix left behind in one prompt is not what it leaves in a longer one.
        if getattr(model.loaded.model, "rotates_by_length", False):
            return None
        budget = self._prefix_cache_bytes
        if budget is None:
            left = self.budget.now_bytes() - model.loaded.nbytes
            budget = max(0, min(left // 10, _MAX_PREFIX_BYTES))
        if not budget or not can_keep(model.loaded.make_cache()):
            return None
        files = self._prefix_files
        return PrefixCache(budget, Spill.open(files, model) if files is not None else None)

    # What is kept of earlier prompts and answers.

    def keep(self, row: Row, states: list[Any], running: Sequence[Row]) -> None:
        """Keep a row's states for other requests; a failure costs time, not answers.

        Args:
            running: All rows that run, which have the first right to memory.
        """
        if self.prefixes is None or self.room is None or row.is_forgotten:
            return
        try:
            self.room.limit_prefixes(running)
            self.prefixes.insert(row.fed, states, row.generation.chat)
        except Exception:
            logger.exception("keeping states failed")
            self.prefixes.clear()

    def save(self, seconds: float) -> None:
        """Save what is kept, as far as this time allows."""
        if self.prefixes is not None:
            self.prefixes.save(seconds)

    def forget(self, chat: str) -> None:
        """Drop what is kept of a chat's words, in memory and on disk; of all words if it is "".

        Raises:
            OSError: a file cannot be removed.
        """
        if self.prefixes is not None:
            self.prefixes.forget(chat)
        if self._prefix_files is not None:
            self._prefix_files.forget(chat)
