"""An Apple GPU as far as the dispatch can tell: kernels go to the Metal host."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import mlx.core as mx
import pytest

from metal import build, dispatch

from .. import metal_host

if sys.platform == "darwin":
    collect_ignore_glob = ["test_metal_host*"]  # the host runs on Linux; a Mac has the real thing


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLX says that its default device is a GPU with Metal, which on a Mac it is; kernels must run
    under `metal_host.install()`. Every test starts as a new process does: nothing trusted."""
    monkeypatch.setattr(mx.fast, "metal_kernel", mx.fast.metal_kernel)  # as it was, afterwards
    metal_host.intercept()
    build.kernel.cache_clear()
    dispatch.forget()
    if sys.platform != "darwin":
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    yield
    dispatch.set_backend("auto")
    dispatch.forget()
    build.kernel.cache_clear()
