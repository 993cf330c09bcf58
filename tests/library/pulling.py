"""What the tests of a pull share: a client in a hurry, a report that watches, what must hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from app.errors import GryphonError
from app.library.hub_cache import RepositoryCache
from app.library.installed import InstalledModel, installed_models
from app.library.patience import Patience
from app.library.transfer import Status

from ..hub_server import HubServer, etag_of

# Long enough for a thread that others keep from its core: a connection given up too early is asked
# for again, and bytes that were on their way are sent twice.
QUICK = Patience(connect_s=10, stall_s=20, first_wait_s=0.01, longest_wait_s=0.02)
HASTY = dataclasses.replace(QUICK, stall_s=0.4)
"""For hubs that go silent."""
PIECE = 1 << 16
SIZE = 300_000
WEIGHTS = "model.safetensors"


class Watch:
    """A report that checks at every call that nothing is listed yet."""

    def __init__(self, then: Callable[[Status], None] | None = lambda status: None) -> None:
        """`then` sees each status, too; None for where a model is listed already."""
        self._then = then

    def waiting(self) -> None:
        pass

    def progress(self, status: Status) -> None:
        if self._then is not None:
            assert installed_models() == []
            self._then(status)


def assert_whole(model: InstalledModel, files: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == files
    assert [one.name for one in installed_models()] == [model.name]
    cache = RepositoryCache("org/model")
    assert not list(cache.blobs.glob("*.incomplete"))
    assert not (cache.path / ".gryphon-staging").exists()
    for path in model.path.iterdir():
        assert path.resolve().name == etag_of(path.name, files[path.name])


def refusal(call: Callable[[], Any]) -> GryphonError:
    with pytest.raises(GryphonError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value


def sent_since(hub: HubServer, before: int, file: str = WEIGHTS) -> int:
    return hub.sent(file) - before
