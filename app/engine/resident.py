"""The one model in memory: loading it, with everything that can go wrong said in one sentence."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlxmodels
from app.engine import kernels, memory
from app.engine.fingerprint import weights_on_disk
from app.engine.protocol import ModelRef, Sampling
from app.engine.sampling import recommended_sampling
from app.errors import GryphonError
from mlxmodels.adapters import with_adapter
from mlxmodels.footprint import Footprint
from mlxmodels.hidden_states import HiddenStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidentModel:
    """A loaded model and under which name people asked for it.

    Attributes:
        recommended: The sampling its generation_config.json recommends.
        footprint: What it and the rows it answers take.
        note: How its weights are held and what the settings changed, for people.
        weight_files: What identified the files just before they were read.
    """

    ref: ModelRef
    loaded: mlxmodels.LoadedModel
    recommended: Sampling
    footprint: Footprint
    note: str
    weight_files: list[tuple[object, ...]] = field(default_factory=list)

    @functools.cached_property
    def can_batch(self) -> bool:
        """Whether its layer states can be merged; a few of mlx-lm's cannot."""
        return all(hasattr(cache, "merge") for cache in self.loaded.make_cache())

    @functools.cached_property
    def hidden_states(self) -> HiddenStates:
        """What its embeddings are made of.

        Raises:
            GryphonError: "no_embeddings", naming the model.
        """
        try:
            return HiddenStates(self.loaded)
        except mlxmodels.ModelError as error:
            raise GryphonError(
                "no_embeddings",
                f"{self.ref.name} cannot make embeddings: {error}. Choose another model.",
            ) from error

    @property
    def vocab_size(self) -> int:
        return int(self.loaded.config.get("vocab_size") or self.loaded.tokenizer.vocab_size)


def plan_resident(
    ref: ModelRef, budget: memory.MemoryBudget, *, beside_bytes: int = 0
) -> memory.LoadPlan:
    """Decide how a model will be held, from its files' headers.

    Args:
        beside_bytes: What stays in memory beside it.

    Raises:
        GryphonError: "does_not_fit" with the arithmetic, or "invalid_model".
    """
    with _refused_by_name(ref):
        return memory.plan_load(Path(ref.path), budget, beside_bytes=beside_bytes)


def load_resident(
    ref: ModelRef, plan: memory.LoadPlan, progress: Callable[[int, int], None]
) -> ResidentModel:
    """Bring a model into memory.

    Args:
        ref: Which one; its directory was resolved by the library.
        plan: How to hold it.
        progress: Called with bytes done and bytes in all.

    Raises:
        GryphonError: "invalid_model", or "no_apple_gpu".
    """
    with _refused_by_name(ref):
        chosen = kernels.choose_backend()
        files = weights_on_disk(ref)
        total = plan.footprint.stored_bytes
        progress(0, total)
        loaded = mlxmodels.load(ref.path, dtype=plan.dtype)
        if ref.adapter:
            loaded = with_adapter(loaded, ref.adapter)
        loaded.make_cache()  # a model without states is refused now, by name
        recommended = recommended_sampling(_generation_config(Path(ref.path)))
        footprint = plan.footprint
        if mlxmodels.supported(loaded.family) != "native":
            footprint = memory.measured(footprint, loaded.model, loaded.make_cache())
        progress(total, total)
    note = f"{plan.note}, {chosen}" if chosen else plan.note
    return ResidentModel(ref, loaded, recommended, footprint, note, files)


@contextlib.contextmanager
def _refused_by_name(ref: ModelRef) -> Iterator[None]:
    try:
        yield
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


def _generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json where there is one; what is wrong in it recommends nothing."""
    try:
        config = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
