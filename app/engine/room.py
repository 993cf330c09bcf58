"""Who may run in the memory there is: rows are admitted, wait, shrink their steps or are ended.

One account: weights, the rows' states, one decode step of them all and one chunk of prefill, and
what is left may go to the prefix cache. Rows are counted with room for an answer of some length
(`_MODEST_ANSWER`) and grow beyond it under check, so a row that has begun may have to end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from app.engine.batch import Row
from app.engine.memory import MemoryBudget
from app.engine.prefix_cache import PrefixCache
from app.engine.protocol import Progress
from app.engine.resident import ResidentModel
from app.errors import GryphonError
from app.machine import binary_bytes
from mlxmodels.footprint import MIN_CHUNK, SLOT_STEP, Footprint

# Tokens of an answer that are set aside when its request is admitted.
_MODEST_ANSWER = 512
# A request waits so long for the memory of others before it is told to come again.
MAX_WAIT_S = 30.0
RETRY_AFTER_S = 1.0


class Room:
    """The account of one resident model.

    Args:
        name: Of the model, for errors.
        weight_bytes: Held as long as this account is.
        prefixes: Sheds first; None where nothing is kept.
        chunk: Tokens of prompt read at a time while there is room.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        footprint: Footprint,
        name: str,
        weight_bytes: int,
        prefixes: PrefixCache | None,
        chunk: int,
    ) -> None:
        self._budget = budget
        self._footprint = footprint
        self._name = name
        self._weight_bytes = weight_bytes
        self._prefixes = prefixes
        self._most_prefix_bytes = prefixes.budget_bytes if prefixes is not None else 0
        self._chunk = chunk
        self._draft: ResidentModel | None = None
        self._checked: tuple[int, int] = (0, 0)
        self.context = footprint.largest_context(budget.limit_bytes - weight_bytes, MIN_CHUNK)
        """Tokens of prompt and answer that one row may have; None if memory sets no limit."""

    def hold_draft(self, draft: ResidentModel | None) -> None:
        """A draft model is held beside the other from now on, in place of the one before."""
        for model, sign in ((self._draft, -1), (draft, 1)):
            self._weight_bytes += sign * model.loaded.nbytes if model is not None else 0
        self._draft = draft
        left = self._budget.limit_bytes - self._weight_bytes
        self.context = self._footprint.largest_context(left, MIN_CHUNK)

    def make_way(self, nbytes: int) -> None:
        """Let go of what is only kept for later, as far as something of so many bytes needs it."""
        self._shed(nbytes)

    def admits(self, row: Row, running: Sequence[Row]) -> bool:
        """Whether a row may begin now; if not, it may when rows that run have ended.

        Raises:
            GryphonError: "does_not_fit", it never will; "out_of_memory", it does not now and
                nothing runs that could end.
        """
        least = len(row.prompt) + 1
        if self.context is not None and least > self.context:
            raise self._never(row, least)
        available = self._budget.now_bytes()
        rows = [*running, row]
        if self._weight_bytes + self._needed(rows, MIN_CHUNK) <= available:
            return True
        if running:
            return False
        # Without the answer's share: nobody else needs it, and growth is checked.
        if self._weight_bytes + self._rows_bytes(MIN_CHUNK, least, [row]) <= available:
            return True
        raise GryphonError(
            "out_of_memory",
            f"{self._name} needs {binary_bytes(self._footprint.row_bytes(MIN_CHUNK, least))} for "
            f"a prompt of {len(row.prompt)} tokens beside {binary_bytes(self._weight_bytes)} of "
            f"weights, and other programs leave {binary_bytes(available)} for both. Close some, "
            "or try again in a moment.",
            retry_after=RETRY_AFTER_S,
        )

    def _never(self, row: Row, tokens: int) -> GryphonError:
        model, limit = self._footprint, self._budget.limit_bytes
        state = model.state_bytes(tokens)
        return GryphonError(
            "does_not_fit",
            f"A prompt of {len(row.prompt)} tokens does not fit: weights of {self._name} take "
            f"{binary_bytes(self._weight_bytes)}, the state of the prompt "
            f"{binary_bytes(state)} and computing "
            f"{binary_bytes(model.row_bytes(MIN_CHUNK, tokens) - state)}; the "
            f"engine may hold {binary_bytes(limit)}, which has room for {self.context} tokens of "
            "prompt and answer. Shorten the prompt or start a new chat.",
        )

    def wait(self, row: Row) -> None:
        """Let a row wait until others have ended, and tell who asked; only for a while.

        Raises:
            GryphonError: "out_of_memory".
        """
        now = time.monotonic()
        if not row.waits_for_memory_s:
            row.waits_for_memory_s = now
            row.emit(Progress(row.request.id, "queue", 0, 0, "waiting for memory"))
        if now - row.waits_for_memory_s > MAX_WAIT_S:
            raise GryphonError(
                "out_of_memory",
                f"The engine has had no memory for this request for {MAX_WAIT_S:g} s: requests "
                "that run take it. Try again in a moment.",
                retry_after=RETRY_AFTER_S,
            )

    def step(self, rows: Sequence[Row]) -> int:
        """Tokens of prompt to read next: fewer when memory is short, after the prefix cache has
        given what it can; 0 if not even a few fit.

        Args:
            rows: All that run, the one that reads among them.
        """
        self._shed(self._needed(rows, self._chunk))
        size = self._chunk
        while not self._has(self._needed(rows, size)):
            if size <= MIN_CHUNK:
                # Nothing set aside for answers is worth ending a row for.
                return MIN_CHUNK if self._has(self._needed(rows, MIN_CHUNK, answer=1)) else 0
            size = max(MIN_CHUNK, size // 2)
        return size

    def can_grow(self, rows: Sequence[Row]) -> bool:
        """Whether rows that decode may feed another token; sheds the prefix cache for it."""
        if not rows:
            return True
        now = len(rows), max(_read(row) + 1 for row in rows) // SLOT_STEP
        if now == self._checked:
            return True
        # As many as any of the next steps needs, until this is checked again.
        longest = (now[1] + 1) * SLOT_STEP - 1
        if self.context is not None:
            longest = min(longest, self.context)
        needed = self._rows_bytes(MIN_CHUNK, longest, rows)
        self._shed(needed)
        if not self._has(needed):
            return False
        self._checked = now
        return True

    def scratch_bytes(self, rows: Sequence[Row]) -> int:
        """What is set aside for computing the next tokens of these rows."""
        if not rows:
            return 0
        longest = max(_read(row) + 1 for row in rows)
        return self._footprint.row_bytes(
            MIN_CHUNK, longest, len(rows)
        ) - self._footprint.state_bytes(longest, len(rows))

    def limit_prefixes(self, rows: Sequence[Row]) -> None:
        """Bound the prefix cache by what these rows leave; before something is inserted."""
        if self._prefixes is not None:
            left = self._budget.now_bytes() - self._weight_bytes - self._needed(rows, self._chunk)
            self._prefixes.budget_bytes = max(0, min(left, self._most_prefix_bytes))

    def _needed(self, rows: Sequence[Row], chunk: int, answer: int | None = None) -> int:
        """Bytes of rows with room for an answer, while one of them reads a chunk."""
        answer = _MODEST_ANSWER if answer is None else answer
        longest = max((self._tokens(row, answer) for row in rows), default=0)
        return self._rows_bytes(chunk, longest, rows)

    def _rows_bytes(self, chunk: int, tokens: int, rows: Sequence[Row]) -> int:
        """States and scratch of rows that have read so many tokens, in both models."""
        needed = self._footprint.row_bytes(chunk, tokens, len(rows))
        if self._draft is not None:
            drafted = [row for row in rows if row.uses_draft]
            if drafted:
                needed += self._draft.footprint.row_bytes(chunk, tokens, len(drafted))
        return needed

    def _tokens(self, row: Row, answer: int) -> int:
        if row.embedding is not None:
            return len(row.embedding.longest)
        asked = row.max_tokens or row.generation.max_tokens or answer
        tokens = max(len(row.prompt) + min(asked, answer), _read(row) + 1)
        return tokens if self.context is None else min(tokens, self.context)

    def _has(self, needed: int) -> bool:
        return self._weight_bytes + needed <= self._budget.now_bytes(for_running=True)

    def _shed(self, needed: int) -> None:
        if self._prefixes is not None:
            held = self._weight_bytes + self._prefixes.nbytes
            surplus = held + needed - self._budget.now_bytes()
            if surplus > 0:
                self._prefixes.shed(surplus)


def _read(row: Row) -> int:
    """Tokens that a row's states have read."""
    return row.processed + row.launched


def ended_early(row: Row, rows: int) -> GryphonError:
    """What to tell the row that ends so that the others can go on."""
    return GryphonError(
        "out_of_memory",
        f"Memory ran out while {rows} requests ran; this one, the newest, was ended after "
        f"{row.generated} tokens of its answer. Try again in a moment.",
        retry_after=RETRY_AFTER_S,
    )
