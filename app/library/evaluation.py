"""How well a model foretells a text, in a child process that has MLX."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import paths
from app.errors import GryphonError
from app.library import child
from app.library.fit import Budget, fit_of
from mlxmodels import footprint
from mlxmodels.errors import ModelError


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on a text."""

    perplexity: float
    tokens: int
    """That were foretold: all but the first of each window."""
    window: int
    """Tokens that were read in one go, each window beginning anew."""


def check_memory(model: Path, budget: Budget) -> None:
    """
    Raises:
        GryphonError: "does_not_fit" when a model cannot be loaded here to be evaluated.
    """
    _expands(model, budget)


def evaluate(
    model: Path, text: Path, budget: Budget, progress: Callable[[int, int], None]
) -> Evaluation:
    """
    Args:
        model: A model directory.
        text: UTF-8.
        progress: Called with tokens read and tokens in all; may raise to cancel.

    Raises:
        GryphonError: "evaluation_failed", "does_not_fit".
    """
    result: dict[str, Any] = {}

    def hear(event: dict[str, Any]) -> None:
        if "done" in event:
            progress(event["done"], event["total"])
        else:
            result.update(event)

    arguments = [str(model), str(text), *(["float32"] if _expands(model, budget) else [])]
    with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as directory:
        reason = child.run("mlxmodels.perplexity", arguments, Path(directory) / "log", hear)
    if reason is not None or "message" in result:
        why = result.get("message", reason)
        raise GryphonError("evaluation_failed", f"{model.name} could not be evaluated: {why}")
    return Evaluation(**result)


def _expands(model: Path, budget: Budget) -> bool:
    """Whether it is held in float32, as the engine would hold it."""
    try:
        config, tensors = footprint.read_directory(model)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    answer = fit_of(config, tensors, budget)
    if answer.verdict == "does not fit":
        raise GryphonError(
            "does_not_fit",
            f"--eval loads {model.name}, which takes {answer.footprint.least_bytes / 1e9:.1f} GB "
            f"at least, and there are {budget.bytes / 1e9:.1f} GB ({budget.source}).",
        )
    return answer.footprint.weight_bytes != answer.footprint.stored_bytes
