"""A real server on a free loopback port; each test scripts the engine behind it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from app.engine.protocol import (
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    EngineStatus,
    Event,
    GenerationRequest,
    ModelRef,
    Tokenize,
    Tokenized,
)
from app.errors import GryphonError
from app.library.installed import InstalledModel, read_model
from app.server.generation import Models
from app.server.serving import ServerOptions, ServerThread

from ..engine.test_chat_prompt import QWEN3
from ..fakes import FakeEngine
from ..tiny_models import OPEN_LLAMA, write_model, write_scripted_model

SMOL = InstalledModel(
    name="smollm2-135m",
    path=Path("/models/smollm2-135m"),
    family="open-llama",
    size_bytes=100,
    quantization="mixed 4/8-bit",
    context_length=8192,
    source="gryphon",
    modified=1_700_000_000.5,
)
GRIFFIN = InstalledModel(
    name="google/recurrentgemma-2b-it",
    path=Path("/models/griffin"),
    family="recurrent_gemma",
    size_bytes=100,
    quantization="bfloat16",
    context_length=None,
    source="hub",
    modified=1_600_000_000.0,
)


class FakeModels:
    """`app.library.installed` with two models."""

    def installed_models(self) -> list[InstalledModel]:
        return [GRIFFIN, SMOL]

    def find_model(self, name: str | None = None, *, allow_path: bool = False) -> InstalledModel:
        assert not allow_path, "the server must never look at paths"
        name = SMOL.name if name is None else name
        for model in self.installed_models():
            if model.name == name:
                return model
        raise GryphonError(
            "model_not_found",
            f'There is no installed model "{name}"; installed: {GRIFFIN.name}, {SMOL.name}.',
        )


class ScriptedEngine(FakeEngine):
    """A FakeEngine that tests can watch from their own thread."""

    def __init__(self, answers: Sequence[Sequence[str | Event | asyncio.Event]] = ()) -> None:
        super().__init__(answers)
        self.begun = threading.Event()
        """A stream has begun."""
        self.ended = threading.Event()
        """A stream has ended, in whatever way; `cancelled` is final."""
        self.status_error: Exception | None = None
        self.stuck = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self._loop = asyncio.get_running_loop()
        self.begun.set()
        try:
            async with aclosing(super().stream(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.ended.set()

    async def status(self) -> EngineStatus | None:
        if self.stuck:
            await asyncio.Event().wait()
        if self.status_error is not None:
            raise self.status_error
        return await super().status()

    def release(self, gate: asyncio.Event) -> None:
        """Let a stream that waits for `gate` go on."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(gate.set)


class Switchboard:
    """The engine of a server that outlives one test: hands over to the current script."""

    def __init__(self) -> None:
        self.current = ScriptedEngine()
        self.starts = 0
        self.crashes = 0
        self.closed = False

    async def start(self) -> None:
        await self.current.start()

    async def close(self) -> None:
        self.closed = True

    def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        return self.current.stream(request)

    def load(self, model: ModelRef, *, keep_alive_s: float | None = None) -> AsyncIterator[Event]:
        return self.current.load(model, keep_alive_s=keep_alive_s)

    async def status(self) -> EngineStatus | None:
        return await self.current.status()

    async def embed(self, request: Embed) -> Embedded:
        return await self.current.embed(request)

    async def tokenize(self, command: Tokenize) -> Tokenized:
        return await self.current.tokenize(command)

    async def detokenize(self, command: Detokenize) -> Detokenized:
        return await self.current.detokenize(command)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Server:
    """A running server and how tests talk to it."""

    thread: ServerThread
    board: Switchboard = field(default_factory=Switchboard)

    @property
    def port(self) -> int:
        return int(self.thread.url.rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """One request; `body` is bytes as they are, or anything else as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            lower = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, lower, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return self.call("POST", path, body, headers)

    @contextmanager
    def streaming(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """An answer whose headers have arrived; leaving closes the connection."""
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "messages": [{"role": "user", "content": text}], **more}


def completion(prompt: Any = "Once", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "prompt": prompt, **more}


@contextmanager
def running(models: Models | None = None, **options: Any) -> Iterator[Server]:
    board = Switchboard()
    thread = ServerThread(
        lambda: board, ServerOptions(port=0, **options), models=models or FakeModels()
    )
    thread.start()
    try:
        yield Server(thread, board)
    finally:
        thread.stop()
        assert board.closed


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("GRYPHON_HOME", str(path))
        # An HTTP proxy of the machine that runs the tests must not come between.
        patch.setenv("NO_PROXY", "*")
        yield path


@pytest.fixture(scope="session")
def _shared_server(home: Path) -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def _impatient_server(home: Path) -> Iterator[Server]:
    with running(keep_alive_s=0.01) as server:
        yield server


@pytest.fixture
def server(_shared_server: Server) -> Server:
    _shared_server.board.current = ScriptedEngine()
    return _shared_server


@pytest.fixture
def impatient_server(_impatient_server: Server) -> Server:
    """Sends a keep-alive after 10 ms of silence."""
    _impatient_server.board.current = ScriptedEngine()
    return _impatient_server


@pytest.fixture
def engine(server: Server) -> ScriptedEngine:
    return server.board.current


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.thread.url}/v1", api_key="unused", max_retries=0
    ) as client:
        yield client


class FurnishedModels:
    """`app.library.installed` over directories of models, read as they are installed."""

    def __init__(self, directories: dict[str, Path]) -> None:
        self.models = [read_model(path, name, "gryphon") for name, path in directories.items()]

    def installed_models(self) -> list[InstalledModel]:
        return self.models

    def find_model(self, name: str | None = None, *, allow_path: bool = False) -> InstalledModel:
        assert not allow_path, "the server must never look at paths"
        found = next((model for model in self.models if model.name == name), None)
        if found is None:
            raise GryphonError("model_not_found", f"No installed model is called {name!r}.")
        return found


THINKING = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n"
PIECES = ["<think>", "\nHm", "m.", "\n</think>\n\n", "Let me ", "look. ", "<tool_call>",
    '\n{"name": "look', '_up", "arguments": {"q": "one"}}', "\n</tool_call>"]  # fmt: skip
"""What the model "thinker" always says."""


@pytest.fixture(scope="session")
def furnished_models(tmp_path_factory: pytest.TempPathFactory) -> FurnishedModels:
    """ "tiny" says anything, "thinker" thinks, if asked to, and calls; "brooder" always thinks."""
    root = tmp_path_factory.mktemp("furnished")
    return FurnishedModels(
        {
            "tiny": write_model(root / "tiny", OPEN_LLAMA),
            "thinker": write_scripted_model(root / "thinker", PIECES, template=QWEN3),
            "brooder": write_scripted_model(root / "brooder", ["Hello"], template=THINKING),
        }
    )


@pytest.fixture(scope="session")
def _furnished_server(home: Path, furnished_models: FurnishedModels) -> Iterator[Server]:
    with running(furnished_models) as server:
        yield server


@pytest.fixture
def furnished_server(_furnished_server: Server) -> Server:
    """A server over those models and a scripted engine."""
    _furnished_server.board.current = ScriptedEngine()
    return _furnished_server
