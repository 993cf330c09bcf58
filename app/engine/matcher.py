"""The engine's side of a constraint: a process follows it (`app.engine.matcher_process`), and says
for each step which tokens may come.

What the vocabulary and the grammars of other people's making cost or break, they cost and break
there. A step sends the tokens of all its rows before it waits for the first answer, so that their
processes compute at the same time, and while the forward pass runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.engine.constraint import CALLED, Constraint, invalid
from app.errors import GryphonError
from app.settings import child_environment

# Wall-clock seconds; the processes limit their computing themselves, to a fraction of these.
_VOCABULARY_TIMEOUT_S = 120.0
_COMPILE_TIMEOUT_S = 30.0
_STEP_TIMEOUT_S = 5.0
# Constraints compiled at once; further requests wait.
_MOST_COMPILING = 4
_GOES_ON = 0
_TOO_MUCH = "following it takes too much time or memory; make it smaller or repeat less"


class Matcher:
    """One row's constraint, and where in it the answer is.

    Started by `Matchers.start` and from then on used by one thread; `advance` with each token of
    the answer, then `wait` before the next is drawn.

    Args:
        row: The socket of the process that follows.
        size: How many ids the tokenizer has.
        first: What may come first: a bit each for ids 0 to `size` - 1 and for the end.
    """

    def __init__(self, row: socket.socket, size: int, first: bytes) -> None:
        self._row = row
        self._size = size
        self._advancing = False
        self._set(first)
        row.settimeout(_STEP_TIMEOUT_S)

    def _set(self, answer: bytes) -> None:
        bits = np.unpackbits(np.frombuffer(answer, np.uint8), bitorder="little")
        self._tokens = bits[: self._size].view(np.bool_)
        self.may_end = bool(bits[self._size])
        """Whether the answer is complete as it is."""
        self.must_end = self.may_end and not self._tokens.any()
        """Whether nothing may follow."""

    def advance(self, token_id: int) -> None:
        """Tell the token that came; `wait` tells what became of it."""
        with contextlib.suppress(OSError):
            self._row.sendall(struct.pack(">i", token_id))
        self._advancing = True

    def wait(self) -> None:
        """Take in what may come next.

        Raises:
            GryphonError: "constraint_failed": nothing may, or finding out is too much.
        """
        if not self._advancing:
            return
        self._advancing = False
        try:
            status, body = _read_answer(self._row)
        except OSError as error:
            raise _failed(_TOO_MUCH) from error
        if status != _GOES_ON:
            raise _failed(msgspec.msgpack.decode(body, type=tuple[str, str])[1])
        self._set(body)

    def allow(self, into: NDArray[np.bool_], end_ids: Sequence[int]) -> None:
        """Write which tokens may come.

        Args:
            into: [V], the row's part of the step's mask.
            end_ids: The model's ends of sequence, all below V.

        Raises:
            GryphonError: "constraint_failed": only tokens that the model does not have.
        """
        width = min(len(into), self._size)
        into[:width] = self._tokens[:width]
        into[width:] = False
        if self.may_end:
            into[list(end_ids)] = True
        elif not into[:width].any():
            raise _failed("the model has none of the tokens that may come")

    def close(self) -> None:
        """End the process that follows; the row has ended."""
        self._row.close()


class Matchers:
    """Starts a process for each constraint. Used from one event loop at a time.

    The processes are forked from one that has read the vocabulary of the model used last.
    """

    def __init__(self) -> None:
        self._vocabulary: _Vocabulary | None = None
        self._one_at_a_time = asyncio.Lock()
        self._compiling = asyncio.Semaphore(_MOST_COMPILING)

    async def start(self, model_path: str, constraint: Constraint) -> Matcher:
        """Compile a constraint for a model.

        Raises:
            GryphonError: "invalid_constraint", with what is wrong with it; "invalid_model";
                "unsupported_constraint", where the tokenizer is of the wrong kind.
        """
        async with self._compiling:
            row, size = await self._forked(model_path)
            try:
                body = msgspec.msgpack.encode(constraint)
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(_COMPILE_TIMEOUT_S):
                    await loop.sock_sendall(row, struct.pack(">I", len(body)) + body)
                    answer = await _receive(row)
            except (OSError, TimeoutError) as error:
                row.close()
                what = CALLED[constraint.kind]
                raise invalid(f"{what} cannot be followed: {_TOO_MUCH}.") from error
            except BaseException:
                row.close()
                raise
        try:
            return Matcher(row, size, _checked(answer))
        except GryphonError:
            row.close()
            raise

    async def _forked(self, model_path: str) -> tuple[socket.socket, int]:
        """The socket of a new row's process, and how many ids the vocabulary has."""
        async with self._one_at_a_time:
            for attempt in (1, 2):
                if self._vocabulary is None or self._vocabulary.model_path != model_path:
                    await self._end()
                    self._vocabulary = await _read_vocabulary(model_path)
                ours, theirs = socket.socketpair()
                ours.setblocking(False)
                try:
                    socket.send_fds(self._vocabulary.control, [b"r"], [theirs.fileno()])
                    return ours, self._vocabulary.size
                except OSError:
                    ours.close()
                    await self._end()  # it was killed: once more, with another
                    if attempt == 2:
                        raise
                finally:
                    theirs.close()
        raise AssertionError

    async def close(self) -> None:
        """Let go of the vocabulary; rows that have begun go on."""
        async with self._one_at_a_time:
            await self._end()

    async def _end(self) -> None:
        vocabulary, self._vocabulary = self._vocabulary, None
        if vocabulary is not None:
            vocabulary.control.close()
            await asyncio.to_thread(vocabulary.process.wait)


@dataclass(frozen=True)
class _Vocabulary:
    """The process that has read a model's vocabulary and forks on every byte with a socket."""

    model_path: str
    process: subprocess.Popen[bytes]
    control: socket.socket
    size: int


async def _read_vocabulary(model_path: str) -> _Vocabulary:
    control, theirs = socket.socketpair()
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "app.engine.matcher_process",
            str(theirs.fileno()),
            model_path,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=child_environment(TOKENIZERS_PARALLELISM="false"),
    )
    theirs.close()
    control.setblocking(False)
    try:
        async with asyncio.timeout(_VOCABULARY_TIMEOUT_S):
            answer = await _receive(control)
        (size,) = struct.unpack(">I", _checked(answer))
    except BaseException as error:
        control.close()
        process.kill()
        status = await asyncio.to_thread(process.wait)
        if isinstance(error, (OSError, TimeoutError)):
            raise GryphonError(
                "constraint_failed",
                f"The process that follows constraints did not start (exit status {status}). "
                "Try again; `gryphon doctor` shows where the engine's log is.",
            ) from error
        raise
    return _Vocabulary(model_path, process, control, size)


def _checked(answer: tuple[int, bytes]) -> bytes:
    status, body = answer
    if status != _GOES_ON:
        raise GryphonError(*msgspec.msgpack.decode(body, type=tuple[str, str]))
    return body


def _failed(why: str) -> GryphonError:
    why = why.rstrip(".")
    return GryphonError("constraint_failed", f"The answer cannot go on by its constraint: {why}.")


async def _receive(row: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer, without blocking the loop.

    Raises:
        ConnectionError: the process has ended.
    """
    loop = asyncio.get_running_loop()

    async def exactly(size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            part = await loop.sock_recv(row, size - len(got))
            if not part:
                raise ConnectionError
            got += part
        return bytes(got)

    size, status = struct.unpack(">IB", await exactly(5))
    return status, await exactly(size - 1)


def _read_answer(row: socket.socket) -> tuple[int, bytes]:
    """The same on a socket with a timeout."""

    def exactly(size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            part = row.recv(size - len(got))
            if not part:
                raise ConnectionError
            got += part
        return bytes(got)

    size, status = struct.unpack(">IB", exactly(5))
    return status, exactly(size - 1)
