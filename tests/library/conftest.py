"""Fixtures of the library's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.library.hub import Hub

from ..embedded_model import embedded_gguf, embedded_home
from ..hub_server import HubServer, running
from .model_files import model_files
from .pulling import QUICK, SIZE

__all__ = ["embedded_gguf", "embedded_home"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, which this process and its children use with an empty cache and without a token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield server


@pytest.fixture
def client(hub: HubServer) -> Iterator[Hub]:
    with Hub(QUICK) as client:
        yield client


@pytest.fixture
def files(hub: HubServer) -> dict[str, bytes]:
    """The content of org/model."""
    files = model_files(size=SIZE)
    hub.add("org/model", files)
    return files
