"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from app.engine.protocol import ModelRef

from ..tiny_models import write_model
from .asking import FAMILIES


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("prefixes")
    return {
        name: ModelRef(name, str(write_model(root / name.replace(" ", "_"), config)))
        for name, config in FAMILIES.items()
    }
