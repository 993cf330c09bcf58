"""Real clients, unmodified, each in an environment of its own, against the real server.

The engine behind it is scripted, so that what is tested is the wire: nothing is refused, every
frame parses, every stream has one end, and the client understood what was said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from app.engine.protocol import Event, Finished, Timings, ToolCall, Usage

from ..server.conftest import GRIFFIN, SMOL, Server
from .environments import node_modules, python_with
from .wire import Exchange, Tape

SCRIPTS = Path(__file__).parent / "scripts"
HELLO = "Hello there."
CALL: list[str | Event] = [
    ToolCall(id="", call_id="call_1", name="weather", arguments='{"city": "Paris"}'),
    Finished(id="", reason="tool_calls", usage=Usage(7, 5, 0), timings=Timings(0.0, 0.1, 0.1)),
]


def said_by(words: list[str], tape: Tape, cwd: Path | None = None) -> dict[str, Any]:
    """What a client prints at its end, as JSON."""
    done = subprocess.run(
        words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    wire = "\n".join(f"{one}\n{one.answer[:2000]!r}" for one in tape.exchanges)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{wire}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would lead a client elsewhere."""
    foreign = ("OPENAI_", "ANTHROPIC_", "OLLAMA_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"} | more


def script(name: str, tape: Tape, *more: str, client: str = "") -> dict[str, Any]:
    python = str(python_with(client)) if client else sys.executable
    return said_by([python, "-P", str(SCRIPTS / name), tape.url, SMOL.name, *more], tape)


def node(name: str, tape: Tape) -> dict[str, Any]:
    # Node looks for packages beside the script.
    place = node_modules()
    (place / name).write_text((SCRIPTS / name).read_text())
    return said_by(["node", str(place / name), tape.url, SMOL.name], tape, cwd=place)


MODELS = [GRIFFIN.name, SMOL.name]
CALLS = [["weather", {"city": "Paris"}]]


def test_openai(server: Server, tape: Tape) -> None:
    said_hello: list[list[str | Event]] = [["Hello", " there", "."]]
    server.board.current.answers = [*said_hello * 2, CALL, *said_hello * 4]
    found = script("openai_sdk.py", tape)
    assert found.pop("version") and found.pop("usage") == 10
    assert (found.pop("models"), found.pop("calls")) == (MODELS, CALLS)
    assert [index for index, length in found.pop("vectors") if length] == [0, 1]
    assert set(found.values()) == {HELLO} and len(found) == 6
    assert len(tape.check()) == 9


def test_anthropic(server: Server, tape: Tape) -> None:
    server.board.current.answers = [["Hello", " there", "."]] * 2 + [CALL]
    found = script("anthropic_sdk.py", tape, client="anthropic")
    assert found["calls"] == CALLS
    assert found["message"] == found["stream"] == found["after the call"] == HELLO
    assert (found["stop reason"], found["usage"]) == ("end_turn", 3)
    assert found["counted"] > 0
    assert tape.check() == ["POST /v1/messages"] * 4 + ["POST /v1/messages/count_tokens"]


def test_ollama(server: Server, tape: Tape) -> None:
    server.board.current.answers = [["Hello", " there", "."]] * 2 + [CALL]
    found = script("ollama_sdk.py", tape, client="ollama")
    assert [name.removesuffix(":latest") for name in found["models"]] == MODELS
    assert (found["calls"], found["pull"]) == (CALLS, 403)
    assert found["family"]
    texts = ("chat", "stream", "after the call", "generate", "generate stream")
    assert {found[name] for name in texts} == {HELLO}
    (refused,) = [one for one in tape.exchanges if one.path == "/api/pull"]
    assert "gryphon pull" in refused.answer.decode()
    tape.exchanges.remove(refused)
    tape.check()


def test_litellm(tape: Tape) -> None:
    """In two of the dialects that it speaks; the third is among the bodies below."""
    found = script("litellm_sdk.py", tape, "openai", "anthropic", client="litellm")
    assert found.pop("version")
    assert found == {"openai": [HELLO, HELLO], "anthropic": [HELLO, HELLO]}
    assert tape.check() == ["POST /v1/chat/completions"] * 2 + ["POST /v1/messages"] * 2


def test_llm(tape: Tape, tmp_path: Path) -> None:
    """Simon Willison's `llm`, which takes an OpenAI-compatible endpoint from a file."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: gryphon\n  model_name: {SMOL.name}\n  api_base: {tape.url}/v1\n"
    )
    llm = str(python_with("llm").with_name("llm"))
    for more in ([], ["--no-stream", "-s", "Be brief.", "-o", "temperature", "0"]):
        done = subprocess.run(
            [llm, "-m", "gryphon", "--key", "unused", *more, "Hi"],
            env=environment(LLM_USER_PATH=str(tmp_path)),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, f"{HELLO}\n"), done.stderr
    assert tape.check() == ["POST /v1/chat/completions"] * 2


def test_npm_openai(tape: Tape) -> None:
    found = node("openai.mjs", tape)
    assert found.pop("version") and found.pop("models") == MODELS
    assert set(found.values()) == {HELLO} and len(found) == 4
    assert len(tape.check()) == 5


def test_npm_ollama(tape: Tape) -> None:
    found = node("ollama.mjs", tape)
    assert [name.removesuffix(":latest") for name in found["models"]] == MODELS
    assert found["chat"] == found["stream"] == found["generate"] == HELLO
    tape.check()


def test_ai_sdk(server: Server, tape: Tape) -> None:
    server.board.current.answers = [["Hello", " there", "."]] * 2 + [CALL]
    found = node("ai_sdk.mjs", tape)
    assert found["chat"] == found["stream"] == HELLO
    assert (found["usage"], found["calls"]) == (10, CALLS)
    assert tape.check() == ["POST /v1/chat/completions"] * 3


# llama.vim ignores the answer: it would only have the prompt read before it is needed.
REFUSED = {"llama-vim-instruct-warm-up": ("n_predict", "response_fields")}
"""Bodies that are refused, and for which fields."""


def bodies() -> Iterator[ParameterSet]:
    for file in sorted((Path(__file__).parent / "bodies").glob("*.json")):
        told = json.loads(file.read_text().replace("MODEL", SMOL.name)) | {"name": file.stem}
        yield pytest.param(told, id=file.stem)


@pytest.mark.parametrize("told", list(bodies()))
def test_what_editors_send_is_answered(told: dict[str, Any], server: Server) -> None:
    """Requests written by hand after the editors' documentation: our reading, not a recording."""
    assert told["reading_of"].startswith("https://") and told["written"] == "by hand"
    request = told["request"]
    body = json.dumps(request["body"]).encode() if "body" in request else None
    method, path = request.get("method", "POST"), request["path"]
    sent = {"Content-Type": "application/json"} if body and not request.get("no_type") else {}
    connection = server.connect()
    try:
        connection.request(method, path, body, sent | request.get("headers", {}))
        reply = connection.getresponse()
        answer = reply.read()
    finally:
        connection.close()
    kind = reply.getheader("content-type", "")
    if refused := REFUSED.get(told["name"]):
        assert reply.status == 400 and json.loads(answer)["error"]["param"] in refused
        return
    Exchange(method, path, body or b"", reply.status, kind, answer).check()
    if request.get("body", {}).get("stream"):
        assert kind.partition(";")[0] in ("text/event-stream", "application/x-ndjson")
        assert all(word in answer.decode() for word in ("Hello", " there"))
