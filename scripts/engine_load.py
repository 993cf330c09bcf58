"""Load on an endpoint: concurrent clients that stream, and the two servers that they meet.

Run as a program it is mlx-lm's server with Gryphon's BLAS, and takes that server's options:

    .venv/bin/python scripts/engine_load.py --model DIRECTORY --port 8080
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0
WORDS = [
    *("river", "stone", "garden", "window", "letter", "summer", "engine", "market", "mountain"),
    *("paper", "silver", "harbor", "winter", "bridge", "candle", "forest", "travel", "island"),
]


@dataclass(frozen=True)
class Task:
    """What every client of a round asks for; no two prompts begin alike."""

    words: int = 60
    tokens: int = 48
    is_seeded: bool = False

    def body(self, model: str, number: int) -> bytes:
        draw = random.Random(number)
        prompt = f"{number} " + " ".join(draw.choices(WORDS, k=self.words))
        fields: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0.7,
            "top_p": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields | ({"seed": number} if self.is_seeded else {})).encode()


@dataclass
class Round:
    """What some concurrent clients saw."""

    seconds: float
    tokens: int
    first_token_s: list[float]

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Server:
    """A server under load and the name by which it knows the model."""

    port: int
    model: str

    def meet(self, clients: int, task: Task, number: int) -> Round:
        """Let `clients` ask at once and read their answers to the end."""
        return asyncio.run(self._meet(clients, task, number))

    async def _meet(self, clients: int, task: Task, number: int) -> Round:
        begin = time.perf_counter()
        bodies = [task.body(self.model, number * 1000 + client) for client in range(clients)]
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answers = await asyncio.gather(*map(self._ask, bodies))
        seconds = time.perf_counter() - begin
        for _, tokens in answers:
            if tokens != task.tokens:
                raise RuntimeError(f"an answer has {tokens} tokens instead of {task.tokens}")
        return Round(seconds, sum(tokens for _, tokens in answers), [first for first, _ in answers])

    async def _ask(self, body: bytes) -> tuple[float, int]:
        """Seconds until the first text, and how many tokens the server counted."""
        begin = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        first, tokens, seen = 0.0, 0, b""
        # Lines of a chunked body: a frame is a line of its own in both servers' answers.
        async for line in reader:
            seen += line if len(seen) < 1000 else b""
            if not line.startswith(b"data: {"):
                continue
            frame = json.loads(line[6:])
            if not first and any(choice.get("text") for choice in frame.get("choices", ())):
                first = time.perf_counter() - begin
            if frame.get("usage"):
                tokens = frame["usage"]["completion_tokens"]
        writer.close()
        if not tokens:
            raise RuntimeError(f"the server on port {self.port} answered {seen[:500]!r}")
        return first, tokens


@contextlib.contextmanager
def gryphon_server(model: str, environment: dict[str, str]) -> Iterator[Server]:
    """`gryphon serve`; the model is one of its installed ones."""
    port = free_port()
    command = [sys.executable, "-c", "from app.cli import main; raise SystemExit(main())"]
    with _running([*command, "serve", "--port", str(port)], port, "/v1/models", environment):
        yield Server(port, model)


@contextlib.contextmanager
def mlx_lm_server(path: Path, environment: dict[str, str], *, matched: bool) -> Iterator[Server]:
    """`mlx_lm.server`, with Gryphon's BLAS or as it installs."""
    port = free_port()
    command = [sys.executable, *([__file__] if matched else ["-m", "mlx_lm", "server"])]
    options = ["--model", str(path), "--port", str(port), "--log-level", "WARNING"]
    with _running([*command, *options], port, "/health", environment):
        yield Server(port, "default_model")


@contextlib.contextmanager
def _running(
    command: list[str], port: int, path: str, environment: dict[str, str]
) -> Iterator[None]:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not serve")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    from app.engine import blas

    blas.preload()
    from mlx_lm.server import main

    main()
