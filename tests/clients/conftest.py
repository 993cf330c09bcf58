"""The server of the REST tests behind a recorder, for clients that are processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..server.conftest import Server, _shared_server, engine, home, server
from .wire import Tape

__all__ = ["_shared_server", "engine", "home", "server"]


@pytest.fixture
def tape(server: Server) -> Iterator[Tape]:
    """Between the client and the server; every exchange is checked at the end of the test."""
    with Tape(server.port).running() as tape:
        yield tape
