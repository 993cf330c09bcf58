"""`/metrics`: what the engine and this process do, in the format that Prometheus reads.

Each scrape asks the engine once and counts nothing itself. An engine's counters begin at zero with
each engine, which Prometheus expects of a process that restarts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from app import __version__
from app.engine.protocol import Counters, EngineStatus, Histogram
from app.errors import GryphonError
from app.server.errors import log_fault
from app.server.generation import Engine

_TIMEOUT_S = 2.0


def router(engine: Engine) -> APIRouter:
    """The route over `engine`, which a scrape never starts."""
    routes = APIRouter()

    text = {"application/openmetrics-text": {"schema": {"type": "string"}}}
    answers: dict[int | str, dict[str, Any]] = {200: {"content": text}}

    @routes.get("/metrics", tags=["Gryphon"], response_class=PlainTextResponse, responses=answers)
    async def metrics(request: Request) -> Response:
        """Counters, gauges and histograms of the engine and of this process."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_EngineCollector(await _status(engine), engine.starts, engine.crashes))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    return routes


async def _status(engine: Engine) -> EngineStatus | None:
    """None where no engine runs, or none that answers."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await engine.status()
    except (TimeoutError, GryphonError):
        return None
    except Exception as error:
        log_fault("engine status failed", error)
        return None


class _EngineCollector(Collector):
    """One status as metrics. Labels are model names, finish reasons and error codes only: nothing
    of which a client can make up ever new ones."""

    def __init__(self, status: EngineStatus | None, starts: int, crashes: int) -> None:
        self._status = status
        self._starts = starts
        self._crashes = crashes

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("gryphon", "Version of Gryphon.", {"version": __version__})
        yield CounterMetricFamily(
            "gryphon_engine_starts", "Engines that this process has started.", self._starts
        )
        yield CounterMetricFamily(
            "gryphon_engine_crashes",
            "Engines that ended unexpectedly while this process used them.",
            self._crashes,
        )
        status = self._status
        yield GaugeMetricFamily(
            "gryphon_engine_up", "Whether an engine runs and answers.", float(status is not None)
        )
        if status is not None:
            yield from _now(status)
            if status.counters is not None:
                yield from _since_start(status.counters)


def _now(status: EngineStatus) -> Iterable[Metric]:
    model = GaugeMetricFamily(
        "gryphon_model_loaded", "1 for the model that is in memory.", labels=["model"]
    )
    if status.model is not None and status.state == "ready":
        model.add_metric([status.model.name], 1)
    yield model
    for name, text, value in (
        ("engine_uptime_seconds", "Time since the engine started.", status.uptime_s),
        ("requests_running", "Requests being read or answered.", status.running),
        ("requests_queued", "Requests that wait for their turn.", status.queued),
        ("weights_bytes", "Weights of the model in memory.", status.weight_bytes),
        ("state_bytes", "Key/value and recurrent states of requests.", status.state_bytes),
        ("prefix_cache_bytes", "States kept for later requests.", status.prefix_bytes),
        ("active_memory_bytes", "What MLX holds in all.", status.active_bytes),
    ):
        yield GaugeMetricFamily(f"gryphon_{name}", text, value)


def _since_start(counters: Counters) -> Iterable[Metric]:
    finished = CounterMetricFamily(
        "gryphon_requests_finished", "Requests that ended well.", labels=["reason"]
    )
    for reason, count in sorted(counters.finished.items()):
        finished.add_metric([reason], count)
    yield finished
    failed = CounterMetricFamily(
        "gryphon_requests_failed", "Requests that failed or were refused.", labels=["code"]
    )
    for code, count in sorted(counters.failed.items()):
        failed.add_metric([code], count)
    yield failed
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens of accepted requests.", counters.prompt_tokens),
        (
            "cached_tokens",
            "Those of them whose states were kept from earlier requests.",
            counters.cached_tokens,
        ),
        ("generated_tokens", "Tokens of answers.", counters.generated_tokens),
        ("model_loads", "Models brought into memory.", counters.model_loads),
    ):
        yield CounterMetricFamily(f"gryphon_{name}", text, value)
    for name, text, histogram in (
        ("queue_seconds", "From a request's arrival until it is read.", counters.queue_s),
        (
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            counters.first_token_s,
        ),
        (
            "time_between_tokens_seconds",
            "From one token of an answer to the next.",
            counters.between_tokens_s,
        ),
        ("request_seconds", "From arrival to end of finished requests.", counters.request_s),
    ):
        yield _histogram(f"gryphon_{name}", text, histogram)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets, below = [], 0
    for bound, count in zip([*histogram.bounds, math.inf], histogram.counts, strict=True):
        below += count  # Prometheus' buckets include those under them
        buckets.append(("+Inf" if math.isinf(bound) else str(bound), float(below)))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, histogram.sum)
    return family
