"""Ports of language models to MLX, one family per file, and the loading of a model directory.

Names are resolved on first use: `import mlxmodels.tokenizer` must not import MLX, so that a process
without a model can count tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxmodels.errors import ModelError
    from mlxmodels.loading import LoadedModel, load
    from mlxmodels.registry import supported

__all__ = ["LoadedModel", "ModelError", "load", "supported"]

_HOMES = {
    "LoadedModel": "mlxmodels.loading",
    "ModelError": "mlxmodels.errors",
    "load": "mlxmodels.loading",
    "supported": "mlxmodels.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
