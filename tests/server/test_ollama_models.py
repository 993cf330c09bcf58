"""What clients of Ollama find out about the endpoint and its models."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from app.engine.protocol import EngineStatus
from app.server.listening import _is_gryphon
from app.server.ollama_models import human_number

from ..tiny_models import write_scripted_model
from .conftest import GRIFFIN, SMOL, FurnishedModels, ScriptedEngine, Server, running


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    get, head = server.call("GET", path), server.call("HEAD", path)
    assert get.status == head.status == 200 and get.body and not head.body
    assert get.headers["content-type"] == head.headers["content-type"]
    assert get.headers["content-length"] == head.headers["content-length"]


def test_the_root_says_what_clients_look_for(server: Server) -> None:
    reply = server.call("GET", "/")
    assert reply.body == b"Ollama is running"
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"


def test_another_gryphon_is_known_by_its_header(server: Server) -> None:
    assert _is_gryphon(server.port)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        assert not _is_gryphon(other.server_port)


def test_the_version_is_one_that_clients_accept(server: Server) -> None:
    body = server.call("GET", "/api/version").body
    found = re.fullmatch(rb'\{"version":"(\d+)\.(\d+)\.(\d+)"\}', body)
    assert found is not None
    assert tuple(map(int, found.groups())) >= (0, 13, 4)  # Codex's least; Copilot's is 0.6.4


def test_tags(furnished_server: Server) -> None:
    models = furnished_server.call("GET", "/api/tags").json["models"]
    assert [one["name"] for one in models] == ["tiny", "thinker", "brooder"]
    tiny = models[0]
    assert tiny.keys() == {"name", "model", "modified_at", "size", "digest", "details"}
    assert tiny["model"] == "tiny" and tiny["size"] > 0
    assert datetime.fromisoformat(tiny["modified_at"]).tzinfo == UTC
    assert re.fullmatch("[0-9a-f]{64}", tiny["digest"])
    assert len({one["digest"] for one in models}) == 3
    details = tiny["details"]
    assert re.fullmatch(r"\d+K", details.pop("parameter_size"))
    assert details == {
        "parent_model": "",
        "format": "safetensors",
        "family": "open-llama",
        "families": ["open-llama"],
        "quantization_level": "float32",
    }


def test_models_whose_files_cannot_be_read_are_listed_all_the_same(server: Server) -> None:
    models = server.call("GET", "/api/tags").json["models"]
    assert [one["name"] for one in models] == [GRIFFIN.name, SMOL.name]
    assert models[0]["details"]["parameter_size"] == ""
    assert hashlib.sha256().digest_size * 2 == len(models[0]["digest"])


@pytest.mark.parametrize(
    ("name", "capabilities"),
    [
        ("tiny", ["completion"]),
        ("thinker:latest", ["completion", "tools", "thinking"]),
        ("brooder", ["completion", "thinking"]),
    ],
)
def test_show(furnished_server: Server, name: str, capabilities: list[str]) -> None:
    shown = furnished_server.post("/api/show", {"model": name}).json
    assert shown["capabilities"] == capabilities
    assert datetime.fromisoformat(shown["modified_at"]).tzinfo == UTC
    assert "{%" in shown["template"]
    info = shown["model_info"]
    family = info["general.architecture"]
    assert info["general.basename"] == name.partition(":")[0]
    assert info[f"{family}.context_length"] == 512
    assert info[f"{family}.embedding_length"] > 0 and info["general.parameter_count"] > 1000
    assert shown["details"]["family"] == family
    assert not furnished_server.board.current.started


def test_models_that_fill_gaps_say_so(tmp_path: Path, server: Server) -> None:
    model = write_scripted_model(
        tmp_path / "coder", ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    )
    with running(FurnishedModels({"coder": model})) as coder:
        shown = coder.post("/api/show", {"model": "coder"}).json
    assert shown["capabilities"] == ["completion", "insert"]


def test_show_by_the_older_word(furnished_server: Server) -> None:
    assert furnished_server.post("/api/show", {"name": "tiny", "verbose": True}).status == 200
    reply = furnished_server.post("/api/show", {})
    assert reply.status == 400 and "`model`" in reply.json["error"]
    assert furnished_server.post("/api/show", {"model": "none"}).status == 404


def test_a_model_without_a_limit_has_a_number_all_the_same(server: Server) -> None:
    """Copilot and Zed take a missing one for 4096."""
    info = server.post("/api/show", {"model": GRIFFIN.name}).json["model_info"]
    assert info["recurrent_gemma.context_length"] == 2**20


class Resident(ScriptedEngine):
    """An engine that holds a model."""

    left_s: float | None = 60.0
    device = "CPU"

    async def status(self) -> EngineStatus | None:
        status = await super().status()
        assert status is not None
        return msgspec.structs.replace(
            status,
            model=SMOL.ref,
            state="ready",
            weight_bytes=1000,
            state_bytes=200,
            device=self.device,
            context_length=4096,
            keep_alive_left_s=self.left_s,
        )


def test_ps(server: Server, engine: ScriptedEngine) -> None:
    assert server.call("GET", "/api/ps").json == {"models": []}
    engine = server.board.current = Resident()
    before = datetime.now(UTC).timestamp()
    (one,) = server.call("GET", "/api/ps").json["models"]
    expires = datetime.fromisoformat(one.pop("expires_at")).timestamp()
    assert before + 60 <= expires + 1e-3 and expires <= datetime.now(UTC).timestamp() + 60
    tags = server.call("GET", "/api/tags").json["models"]
    assert one == {
        "name": SMOL.name,
        "model": SMOL.name,
        "size": 1200,
        "digest": tags[1]["digest"],
        "details": tags[1]["details"],
        "size_vram": 0,
        "context_length": 4096,
    }
    engine.left_s, engine.device = None, "Apple GPU"
    (one,) = server.call("GET", "/api/ps").json["models"]
    assert one["size_vram"] == 1200
    assert datetime.fromisoformat(one["expires_at"]).year > 2200


@pytest.mark.parametrize(
    ("method", "path", "command"),
    [
        ("POST", "/api/pull", "gryphon pull"),
        ("DELETE", "/api/delete", "gryphon rm"),
        ("POST", "/api/create", "gryphon pull"),
        ("POST", "/api/push", "gryphon list"),
        ("POST", "/api/copy", "gryphon list"),
        ("POST", "/api/blobs/sha256:0", "gryphon pull"),
    ],
)
def test_routes_that_change_models_name_the_command(
    server: Server, method: str, path: str, command: str
) -> None:
    reply = server.call(method, path, {"model": "x"})
    assert reply.status == 403 and command in reply.json["error"]
    assert reply.json.keys() == {"error"}


def test_unknown_routes_answer_in_ollamas_shape(server: Server) -> None:
    assert server.call("HEAD", "/api/blobs/sha256:0").status == 403
    for path in ("/api/me", "/api/experimental/web_search"):
        reply = server.post(path, {})
        assert reply.status == 404 and isinstance(reply.json["error"], str)


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (135_000, "135K"), (134_515_008, "134.52M"), (7_000_000_000, "7B"),
     (2_683_862_016, "2.7B")],
)  # fmt: skip
def test_numbers_of_parameters(count: int, text: str) -> None:
    assert human_number(count) == text
