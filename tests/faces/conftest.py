"""A home with the real embedded model, shared with the library's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..embedded_model import embedded_home

__all__ = ["embedded_home"]


@pytest.fixture
def furnished(home: Path, embedded_home: Path) -> Path:
    """This test's own home, with the embedded model installed."""
    models = home / "data" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m").symlink_to(embedded_home / "data" / "models" / "smollm2-135m")
    return home
