"""A scheduler on its own thread that is asked for answers, and conversations to ask about."""

from __future__ import annotations

import contextlib
import random
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.engine.batch import Row
from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Progress,
    Sampling,
    Token,
)
from app.engine.scheduler import Scheduler
from mlxmodels.saved_state import load_states

from ..tiny_models import FALCON_H1, GEMMA2, LLAMA, OPEN_LLAMA, QWEN3_NEXT, RECURRENT_GEMMA

FAMILIES = {
    "gemma2": GEMMA2,  # growing states, and windows of 8 that are soon full
    "open_llama": OPEN_LLAMA,
    "recurrent_gemma": RECURRENT_GEMMA,
    "zoo llama": LLAMA,
    "zoo falcon_h1": FALCON_H1,  # a recurrence and keys and values in each of its layers
    "zoo qwen3_next": QWEN3_NEXT,
}
TRIMMABLE = ["open_llama", "zoo llama"]
MIB = 1024**2
START, END, NEWLINE = 256, 257, 198


class Asked:
    """A request and its answer."""

    def __init__(self, prompt: list[int], cancel_after: int | None) -> None:
        self.prompt = prompt
        self.cancel_after = cancel_after
        self.tokens: list[int] = []
        self.cached = -1
        self.read = 0
        self.end: Finished | Failed | None = None
        self.ended = threading.Event()


class Engine:
    """A scheduler on its own thread."""

    def __init__(
        self, model: ModelRef, prefix_cache_bytes: int | None, files: PrefixFiles | None = None
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(prefix_cache_bytes, files)
        self._thread = threading.Thread(target=self.scheduler.run, daemon=True)
        self._thread.start()
        self._count = 0

    def submit(
        self,
        prompt: list[int],
        boundaries: Sequence[int] = (),
        *,
        cancel_after: int | None = None,
        **fields: Any,
    ) -> Asked:
        """Queue a request; it may be cancelled after so many tokens, 0: after the first chunk."""
        self._count += 1
        asked = Asked(prompt, cancel_after)
        values: dict[str, Any] = {"model": self.model, "sampling": Sampling(temperature=0)}
        values |= {"max_tokens": 12} | fields
        request = GenerationRequest(id=f"{self._count}", prompt_tokens=[0], **values)

        def emit(event: Event) -> None:  # on the scheduler's thread
            if isinstance(event, Accepted):
                asked.cached = event.cached_tokens
            elif isinstance(event, Progress) and event.phase == "prefill":
                asked.read = event.processed - 1
                if asked.cancel_after == 0:
                    self.scheduler.cancel(row)
            elif isinstance(event, Token):
                asked.tokens.append(event.token_id)
                if len(asked.tokens) == asked.cancel_after:
                    self.scheduler.cancel(row)
            elif isinstance(event, (Finished, Failed)):
                asked.end = event
                asked.ended.set()

        row = Row(request, emit, prompt, list(boundaries))
        self.scheduler.submit(row)
        return asked

    def ask(self, prompt: list[int], boundaries: Sequence[int] = (), **fields: Any) -> Asked:
        asked = self.submit(prompt, boundaries, **fields)
        assert asked.ended.wait(60)
        assert isinstance(asked.end, Finished), asked.end
        assert asked.end.usage.cached_tokens == asked.cached
        return asked

    def forget(self, chat: str) -> None:
        ended = threading.Event()
        errors: list[Any] = []
        self.scheduler.forget(chat, lambda error: (errors.append(error), ended.set()))  # type: ignore[func-returns-value]
        assert ended.wait(60) and errors == [None]

    def save(self) -> None:
        """Return when everything kept is on disk."""
        self.scheduler.save_prefixes(60)

    @property
    def prefix_bytes(self) -> int:
        return self.scheduler.snapshot.prefix_bytes

    def close(self) -> None:
        self.scheduler.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def engine(
    model: ModelRef, prefix_cache_bytes: int | None = 64 * MIB, files: PrefixFiles | None = None
) -> Iterator[Engine]:
    running = Engine(model, prefix_cache_bytes, files)
    try:
        yield running
    finally:
        running.close()


def tokens_of(length: int, seed: object = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


# Conversations as the default template renders them, by ids and by text.


def turn(role: str, content: list[int]) -> list[int]:
    return [START, *role.encode(), NEWLINE, *content, END, NEWLINE]


def rendered(turns: Sequence[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation of (role, ids), with the boundary before its last message's text."""
    *earlier, (role, last) = turns
    head = [id for turn_ in earlier for id in turn(*turn_)] + [START, *role.encode()]
    opening = [START, *b"assistant", NEWLINE]
    return [*head, NEWLINE, *last, END, NEWLINE, *opening], [len(head)]


def check_files(root: Path, *, killed: bool = False) -> int:
    """Nothing but whole files of states, for their owner only; how many.

    Args:
        killed: Whether one may be left unfinished, under a name that nothing reads.
    """
    count = 0
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for directory in root.iterdir():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for path in directory.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            if path.name.startswith("."):
                assert killed
            elif path.suffix == ".safetensors":
                load_states(path)
                count += 1
            else:
                assert path.suffix == ".chats" and PrefixFiles(root).chats(path)
                assert killed or path.with_suffix(".safetensors").exists()
    return count
