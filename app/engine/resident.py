"""The one model in memory: loading it, with everything that can go wrong said in one sentence."""

from __future__ import annotations

import functools
import gc
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxmodels
from app.engine import kernels
from app.engine.fingerprint import weights_on_disk
from app.engine.memory import plan_load
from app.engine.protocol import ModelRef, Sampling
from app.engine.sampling import recommended_sampling
from app.errors import GryphonError
from mlxmodels.adapters import with_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidentModel:
    """A loaded model and under which name people asked for it.

    Attributes:
        recommended: The sampling its generation_config.json recommends.
        note: How its weights are held and what the settings changed, for people.
        weight_files: What identified the files just before they were read.
    """

    ref: ModelRef
    loaded: mlxmodels.LoadedModel
    recommended: Sampling
    note: str
    weight_files: list[tuple[object, ...]] = field(default_factory=list)

    @functools.cached_property
    def can_batch(self) -> bool:
        """Whether its layer states can be merged; a few of mlx-lm's cannot."""
        return all(hasattr(cache, "merge") for cache in self.loaded.make_cache())

    @property
    def vocab_size(self) -> int:
        return int(self.loaded.config.get("vocab_size") or self.loaded.tokenizer.vocab_size)


def load_resident(ref: ModelRef, progress: Callable[[int, int], None]) -> ResidentModel:
    """Bring a model into memory.

    Args:
        ref: Which one; its directory was resolved by the library.
        progress: Called with bytes done and bytes in all.

    Raises:
        GryphonError: "does_not_fit" with the arithmetic, "invalid_model", or "no_apple_gpu".
    """
    try:
        chosen = kernels.choose_backend()
        plan = plan_load(Path(ref.path))
        files = weights_on_disk(ref)
        progress(0, plan.file_bytes)
        loaded = mlxmodels.load(ref.path, dtype=plan.dtype)
        if ref.adapter:
            loaded = with_adapter(loaded, ref.adapter)
        recommended = recommended_sampling(_generation_config(Path(ref.path)))
        progress(plan.file_bytes, plan.file_bytes)
    except GryphonError:
        raise
    except mlxmodels.ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    except Exception as error:
        logger.exception("loading failed")
        raise GryphonError(
            "invalid_model",
            f"{ref.name} cannot be loaded ({type(error).__name__}: {error}). If its files are "
            "complete, this build of it is not supported.",
        ) from error
    note = f"{plan.note}, {chosen}" if chosen else plan.note
    return ResidentModel(ref, loaded, recommended, note, files)


def _generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json where there is one; what is wrong in it recommends nothing."""
    try:
        config = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def release_memory() -> None:
    """Give back what an unloaded model held; call it once nothing refers to the model."""
    gc.collect()
    mx.clear_cache()
