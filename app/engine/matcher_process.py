"""Grammars are followed here, each row's in a process of its own; `app.engine.matcher` starts them.

One process per model reads its vocabulary, which takes seconds for a large one and holds Python's
interpreter lock. It then waits for rows and forks for each: so a row has the vocabulary at once,
and a grammar that takes too long, too much memory or llguidance down with it ends that row alone.
All of them end when the engine goes away, as their sockets close.

A row's process reads one frame with its constraint and answers; then it reads token ids and
answers each. An answer is a frame of a status byte and the tokens that may follow, one bit each in
ids' order, the last of which is the end; or, with status `FAILED`, an error as MessagePack.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import llguidance
import msgspec
import numpy as np

from app.engine.constraint import CALLED, JSON_OPTIONS, Constraint, invalid, parsed_schema
from app.engine.vocabulary import Vocabulary
from app.errors import GryphonError
from mlxmodels.errors import ModelError

GOES_ON, FAILED = 0, 1
# Seconds of computing, whatever else the machine does; llguidance's own limits make most of what
# is too complex fail long before.
COMPILE_LIMIT_S = 3.0
STEP_LIMIT_S = 1.0
# What a row may take beyond the vocabulary, where the system can tell.
_ROW_BYTES = 1024**3
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=50_000,  # of 1 to 2 KB; a bounded schema has some hundreds
    verbose_errors=False,  # those quote what was written
)


class NotFollowed(Exception):
    """The constraint cannot be followed any further; the message is for a person."""


class Follower:
    """One answer's way through its constraint."""

    def __init__(self, vocabulary: Vocabulary, constraint: Constraint) -> None:
        self._matcher = llguidance.LLMatcher(
            vocabulary.tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS
        )
        self._check()
        if warnings := self._matcher.get_grammar_warnings():  # of what would be ignored
            raise NotFollowed(warnings[0])
        self._mask = np.zeros((vocabulary.size + 1 + 31) // 32, np.int32)

    def consume(self, token_id: int) -> None:
        """Go on by one of the tokens allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def allowed(self) -> bytes:
        """The tokens that may follow, one bit each, padded to a multiple of 32.

        Raises:
            NotFollowed: none may, not even the end; or finding them is too much.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        if not self._mask.any():
            raise NotFollowed("it allows no text here, not even the end")
        return self._mask.tobytes()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise NotFollowed(self._matcher.get_error())


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(constraint.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(constraint.text)
    schema = parsed_schema(constraint.text or '{"type": "object"}')
    options: Any = JSON_OPTIONS
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)


def readable(message: str) -> str:
    """llguidance's message in one line."""
    if message.startswith("NoExtension"):
        return "no text matches it"
    lines = [line.strip() for line in message.removeprefix("WARNING: ").splitlines()]
    line = " ".join(line for line in lines if line and line != "<non-verbose/>").rstrip(".")
    return line if len(line) <= 200 else f"{line[:200]} ..."


def _follow(vocabulary: Vocabulary, row: socket.socket) -> None:
    """The life of a row's process after its fork."""
    with row.makefile("rb") as incoming:
        if not (body := _body(incoming)):
            return  # the request was cancelled
        constraint = msgspec.msgpack.decode(body, type=Constraint)
        subject = f"{CALLED[constraint.kind]} cannot be followed: "
        try:
            with _time_limit(COMPILE_LIMIT_S):
                follower = Follower(vocabulary, constraint)
                answer = follower.allowed()
            row.sendall(_frame(GOES_ON, answer))
            subject = ""
            while len(token := incoming.read(4)) == 4:
                with _time_limit(STEP_LIMIT_S):
                    follower.consume(struct.unpack(">i", token)[0])
                    answer = follower.allowed()
                row.sendall(_frame(GOES_ON, answer))
        except GryphonError as error:
            row.sendall(_failed(error))
        except OSError:
            return  # the engine is gone
        except BaseException as error:  # NotFollowed, ValueError; panics are not even Exceptions
            row.sendall(_failed(invalid(f"{subject}{readable(str(error))}.")))


def _body(incoming: BinaryIO) -> bytes:
    head = incoming.read(4)
    return incoming.read(struct.unpack(">I", head)[0]) if len(head) == 4 else b""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Any:
    """End the process if this takes longer; the signal does so even inside native code."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _frame(status: int, body: bytes) -> bytes:
    return struct.pack(">IB", len(body) + 1, status) + body


def _failed(error: GryphonError) -> bytes:
    return _frame(FAILED, msgspec.msgpack.encode((error.code, error.message)))


def _limit_memory() -> None:
    if sys.platform != "linux":  # elsewhere the limit is not one on memory, or not kept
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROW_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(control: socket.socket, directory: Path) -> None:
    try:
        vocabulary = Vocabulary(directory)
    except GryphonError as error:
        control.sendall(_failed(error))
        return
    except (ModelError, OSError) as error:
        control.sendall(_failed(GryphonError("invalid_model", str(error))))
        return
    control.sendall(_frame(GOES_ON, struct.pack(">I", vocabulary.size)))
    gc.collect()
    gc.freeze()  # so that a row's process shares its pages
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            gc.disable()
            _limit_memory()
            # What llguidance prints of a panic may quote what was written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                _follow(vocabulary, socket.socket(fileno=descriptors[0]))
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    """Entry point: the control socket's descriptor and the model's directory."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the rows' processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
