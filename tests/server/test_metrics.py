"""`/metrics` as Prometheus reads it: what it says is what happened, and strangers do not get it."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from app import __version__
from app.engine.client import EngineClient
from app.engine.protocol import Counters, EngineStatus, Histogram
from app.library.installed import InstalledModel
from app.server.serving import ServerOptions, ServerThread

from ..tiny_models import OPEN_LLAMA, write_model
from .conftest import ScriptedEngine, Server, running

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(text: str) -> Samples:
    families = list(parse(text))
    for family in families:
        assert family.documentation and family.type != "unknown", family
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def scrape(server: Server) -> Samples:
    reply = server.call("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return samples_of(reply.body.decode())


class OneModel:
    """`app.library.installed` with one model."""

    def __init__(self, path: Path) -> None:
        self.model = InstalledModel("tiny", path, "open-llama", 1, "float32", 512, "gryphon", 0.0)

    def installed_models(self) -> list[InstalledModel]:
        return [self.model]

    def find_model(self, name: str | None = None, *, allow_path: bool = False) -> InstalledModel:
        return self.model


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server over a real engine, which has not been started."""
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "home"))
    models = OneModel(write_model(tmp_path / "tiny", OPEN_LLAMA))
    thread = ServerThread(EngineClient, ServerOptions(port=0), models=models)
    thread.start()
    yield Server(thread)
    thread.stop()


def answer(server: Server, text: str, tokens: int) -> dict[str, int]:
    """Have a chat answered; its usage."""
    body = {"model": "tiny", "max_tokens": tokens, "temperature": 0}
    reply = server.post(
        "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    )
    assert reply.status == 200, reply.body
    usage: dict[str, int] = reply.json["usage"]
    return usage


def test_metrics_are_what_requests_through_a_real_engine_did(real: Server) -> None:
    before = scrape(real)
    assert before["gryphon_engine_up", ()] == before["gryphon_engine_starts_total", ()] == 0
    usages = [answer(real, "Hello there", 4 + i) for i in range(3)]
    usages.append(answer(real, "And now for something else", 20))
    too_long = real.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "x" * 600}]},
    )
    assert too_long.status == 400
    now = scrape(real)
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert now["gryphon_requests_finished_total", (("reason", "length"),)] == 4
    code = (("code", "context_length_exceeded"),)
    assert now["gryphon_requests_failed_total", code] == 1
    assert now["gryphon_prompt_tokens_total", ()] == prompt
    assert now["gryphon_generated_tokens_total", ()] == generated
    assert 0 < now["gryphon_cached_tokens_total", ()] < prompt
    assert now["gryphon_model_loads_total", ()] == 1
    assert now["gryphon_model_loaded", (("model", "tiny"),)] == 1
    assert now["gryphon_engine_up", ()] == now["gryphon_engine_starts_total", ()] == 1
    assert now["gryphon_requests_running", ()] == now["gryphon_requests_queued", ()] == 0
    assert now["gryphon_weights_bytes", ()] > 0 and now["gryphon_prefix_cache_bytes", ()] > 0
    for name, count in (
        ("queue", 4),
        ("time_to_first_token", 4),
        ("time_between_tokens", generated - 4),
        ("request", 4),
    ):
        name = f"gryphon_{name}_seconds"
        assert now[f"{name}_count", ()] == count
        assert now[f"{name}_bucket", (("le", "+Inf"),)] == count
        assert now[f"{name}_sum", ()] > 0
        buckets = [value for (key, _), value in now.items() if key == f"{name}_bucket"]
        assert buckets == sorted(buckets)
    # An engine that was killed is one crash, and its counters are gone with it.
    status = json.loads(real.call("GET", "/health").body)
    assert status["engine"] == "ready"
    os.kill(engine_pid(), signal.SIGKILL)
    answer_after_crash(real)
    after = scrape(real)
    assert after["gryphon_engine_crashes_total", ()] == 1
    assert after["gryphon_engine_starts_total", ()] == 2
    assert after["gryphon_requests_finished_total", (("reason", "length"),)] == 1


def engine_pid() -> int:
    import asyncio

    async def ask() -> int:
        client = EngineClient()
        try:
            status = await client.status()
            assert status is not None
            return status.pid
        finally:
            await client.close()

    return asyncio.run(ask())


def answer_after_crash(server: Server) -> None:
    """The first request may be the one that meets the dying engine."""
    for _ in range(20):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
        if server.post("/v1/completions", body).status == 200:
            return
    pytest.fail("no answer after the crash")


def test_without_an_engine_there_is_what_this_process_knows(
    server: Server, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none() -> None:
        return None

    monkeypatch.setattr(engine, "status", none)
    server.board.starts, server.board.crashes = 3, 2
    try:
        now = scrape(server)
    finally:
        server.board.starts = server.board.crashes = 0
    ours = {name: value for (name, _), value in now.items() if name.startswith("gryphon")}
    assert ours == {
        "gryphon_info": 1,
        "gryphon_engine_up": 0,
        "gryphon_engine_starts_total": 3,
        "gryphon_engine_crashes_total": 2,
    }
    assert now["gryphon_info", (("version", __version__),)] == 1
    if Path("/proc/self/stat").exists():  # not on macOS
        assert now["process_resident_memory_bytes", ()] > 0


def test_an_engine_that_fails_to_tell_is_down(server: Server, engine: ScriptedEngine) -> None:
    engine.status_error = RuntimeError("no")
    assert scrape(server)["gryphon_engine_up", ()] == 0


def test_buckets_are_cumulative_and_names_are_quoted(
    server: Server, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    histogram = Histogram([0.5, 1.0, 10.0], [1, 0, 3, 2], 99.5)
    name = 'mo"del\\\n{x="1"}'

    async def scripted() -> EngineStatus:
        status = await ScriptedEngine().status()
        assert status is not None
        counters = Counters(
            finished={"stop": 5, "length": 1},
            failed={},
            prompt_tokens=1,
            cached_tokens=2,
            generated_tokens=3,
            model_loads=4,
            queue_s=histogram,
            first_token_s=histogram,
            between_tokens_s=histogram,
            request_s=histogram,
        )
        from app.engine.protocol import ModelRef

        model = ModelRef(name, "/m")
        return msgspec.structs.replace(status, model=model, state="ready", counters=counters)

    monkeypatch.setattr(engine, "status", scripted)
    now = scrape(server)
    assert now["gryphon_model_loaded", (("model", name),)] == 1
    buckets = {
        dict(labels)["le"]: value
        for (key, labels), value in now.items()
        if key == "gryphon_queue_seconds_bucket"
    }
    assert buckets == {"0.5": 1, "1.0": 1, "10.0": 4, "+Inf": 6}
    assert now["gryphon_queue_seconds_sum", ()] == 99.5
    assert now["gryphon_queue_seconds_count", ()] == 6
    accept = "application/openmetrics-text; version=1.0.0"
    reply = server.call("GET", "/metrics", headers={"Accept": accept})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name for family in parse_openmetrics(reply.body.decode())}
    assert {"gryphon_requests_finished", "gryphon_queue_seconds"} <= families


def test_strangers_do_not_get_metrics(server: Server) -> None:
    refused = server.call("GET", "/metrics", headers={"Host": "evil.example"})
    assert refused.status == 403 and refused.error["code"] == "host_not_allowed"
    refused = server.call("GET", "/metrics", headers={"Origin": "https://evil.example"})
    assert refused.status == 403
    with running(api_key="key") as guarded:
        assert guarded.call("GET", "/metrics").status == 401
        with_key = {"Authorization": "Bearer key"}
        assert guarded.call("GET", "/metrics", headers=with_key).status == 200


def test_a_scrape_starts_no_engine(real: Server) -> None:
    for _ in range(2):
        assert scrape(real)["gryphon_engine_starts_total", ()] == 0
    with urllib.request.urlopen(f"{real.thread.url}/health", timeout=30) as reply:
        assert json.load(reply)["engine"] == "stopped"
