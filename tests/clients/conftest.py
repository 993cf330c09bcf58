"""The server of the REST tests behind a recorder, for clients that are processes of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from app.server.application import create_app

from ..fakes import FakeEngine
from ..server.conftest import Server, _shared_server, engine, home, server
from .wire import Tape

__all__ = ["_shared_server", "engine", "home", "server"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what speaks a dialect that the server has not learnt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with the document is other tests' to tell
        routes = set(create_app(FakeEngine()).openapi()["paths"])
    wanted = {item: {mark.args[0] for mark in item.iter_markers("speaks")} for item in items}
    left_out = [item for item in items if wanted[item] - routes]
    items[:] = [item for item in items if not wanted[item] - routes]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def tape(server: Server) -> Iterator[Tape]:
    """Between the client and the server; every exchange is checked at the end of the test."""
    with Tape(server.port).running() as tape:
        yield tape
