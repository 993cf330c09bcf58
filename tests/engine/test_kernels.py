"""The engine's kernels as a person meets them: the setting, and what is said when one fails."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app import paths
from app.engine.client import EngineClient
from app.engine.protocol import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
    Token,
)
from app.errors import GryphonError
from app.settings import Settings

from ..tiny_models import RECURRENT_GEMMA, write_model

# How the engine's process begins.
START = """
import sys
if "app.engine.worker" in sys.orig_argv:
    from app.engine import blas
    blas.preload()
    import mlx.core as mx
    {}
"""
NO_GPU = "mx.set_default_device(mx.cpu)"
GPU_THAT_REFUSES = """
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.Device(mx.gpu, 0)
    def metal_kernel(*_, **__):
        raise RuntimeError("[metal::Device] Unable to build metal library\\n" + 999 * "x")
    mx.fast.metal_kernel = metal_kernel
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Engines begin with some code from here on."""

    def begins_with(code: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(START.format(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)

    return begins_with


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    return ModelRef("tiny", str(write_model(tmp_path / "tiny", RECURRENT_GEMMA)))


async def answer(client: EngineClient, model: ModelRef) -> list[Event]:
    request = GenerationRequest(
        id="r",
        model=model,
        messages=[Message("user", "Hello")],
        sampling=Sampling(temperature=0),
        max_tokens=6,
    )
    return [event async for event in client.stream(request)]


def text(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, (Token, Finished)))


def test_a_wrong_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRYPHON_KERNELS", "cuda")
    with pytest.raises(GryphonError) as caught:
        Settings.from_environment()
    assert caught.value.code == "invalid_setting"
    assert caught.value.message == ("GRYPHON_KERNELS must be auto, metal or reference, got 'cuda'.")
    monkeypatch.setenv("GRYPHON_KERNELS", "")
    assert Settings.from_environment().kernels == "auto"


async def test_insisting_on_kernels_without_an_apple_gpu_is_one_clear_sentence(
    client: EngineClient,
    model: ModelRef,
    monkeypatch: pytest.MonkeyPatch,
    engine: Callable[[str], None],
) -> None:
    engine(NO_GPU)
    monkeypatch.setenv("GRYPHON_KERNELS", "metal")
    (failed,) = await answer(client, model)
    assert isinstance(failed, Failed) and failed.code == "no_apple_gpu"
    assert "GRYPHON_KERNELS=metal needs an Apple GPU" in failed.message
    assert paths.engine_log().read_text() == ""


async def test_the_setting_reaches_the_engine_and_its_status(
    client: EngineClient, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRYPHON_KERNELS", "reference")
    text(await answer(client, model))
    status = await client.status()
    assert status is not None and status.backend_note.endswith("GRYPHON_KERNELS=reference")


async def test_kernels_that_fail_are_in_the_status_and_once_in_the_log(
    client: EngineClient, model: ModelRef, engine: Callable[[str], None]
) -> None:
    alone = EngineClient()
    want = text(await answer(alone, model))
    await alone.close()

    engine(GPU_THAT_REFUSES)
    for _ in range(2):
        assert text(await answer(client, model)) == want
    status = await client.status()
    assert status is not None and status.device == "Apple GPU"
    assert len(status.backend_note) < 1000
    lines = paths.engine_log().read_text().splitlines()
    for op in ("rms_norm_1p", "causal_conv1d", "block_rg_lru"):
        fault = f"kernel of {op} off: RuntimeError: [metal::Device] Unable to build metal library"
        assert status.backend_note.count(fault) == 1
        (warning,) = [line for line in lines if f"kernel of {op} failed its self-check" in line]
        assert "WARNING metal.dispatch" in warning
