"""Does a model fit this machine, and with how much context? From its files, no MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app import machine
from app.errors import GryphonError
from app.library.installed import InstalledModel, context_length
from app.settings import Settings
from mlxmodels import footprint as footprints
from mlxmodels.errors import ModelError
from mlxmodels.footprint import MIN_CHUNK, MIN_CONTEXT, Footprint
from mlxmodels.safetensors_header import TensorEntry

_CONTEXTS = (2048, 8192, 32768, 131072)

Verdict = Literal["fits", "fits, slowly", "does not fit"]


@dataclass(frozen=True)
class Budget:
    """Bytes that the engine may hold here."""

    bytes: int
    source: str
    """Where the figure is from, for people."""
    on_gpu: bool


@dataclass(frozen=True)
class Fit:
    """The arithmetic, and what follows from it."""

    verdict: Verdict
    footprint: Footprint
    budget: Budget
    state_bytes: dict[int, int]
    """State of one row by the tokens it has read."""
    largest_context: int | None
    """Tokens of prompt and answer that fit, at most those the model can hold; None: no limit."""
    limited_by: Literal["memory", "model"] | None
    """What sets that limit."""

    @property
    def scratch_bytes(self) -> int:
        """The least that computing takes, at a context of `MIN_CONTEXT`."""
        least = self.footprint.row_bytes(MIN_CHUNK, MIN_CONTEXT)
        return least - self.footprint.state_bytes(MIN_CONTEXT)


def estimated_budget() -> Budget:
    """What an engine started now would have, as far as one can tell without MLX."""
    memory, working_set = machine.system_memory(), machine.gpu_working_set_estimate()
    total, source = memory.total_bytes, "the memory of this machine, less a reserve"
    if working_set is not None:
        total, source = min(total, working_set), "an estimate of the GPU's working set"
    most = min(total, memory.free_bytes) - machine.RESERVE_BYTES
    if memory.free_bytes < total:
        source = "what is free now, less a reserve"
    cap = Settings.from_environment().memory_bytes
    if cap is not None and cap < most:
        most, source = cap, "GRYPHON_MEMORY_BYTES"
    return Budget(max(0, most), source, working_set is not None)


def fit(model: InstalledModel, budget: Budget) -> Fit:
    """Hold an installed model against a budget.

    Raises:
        GryphonError: "invalid_model" when its files do not say what it takes.
    """
    try:
        config, tensors = footprints.read_directory(model.path)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    return fit_of(config, tensors, budget)


def fit_of(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], budget: Budget) -> Fit:
    """Hold a model against a budget, wherever its files are.

    Args:
        config: config.json.
        tensors: Of all its files together, by name.

    Raises:
        GryphonError: "invalid_model" when they do not say what it takes.
    """
    try:
        forms = footprints.held(config, tensors, budget.bytes, on_gpu=budget.on_gpu)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    return _verdict(*forms, context_length(config), budget)


def fit_of_totals(
    config: Mapping[str, Any], parameters: int, stored_bytes: int, budget: Budget
) -> Fit:
    """As `fit_of`, where only the totals are known: an estimate, of weights and of states."""
    try:
        stored = footprints.of_config(
            config, parameters, stored_bytes, stored_bytes, stored_bytes, 2, on_gpu=budget.on_gpu
        )
        if budget.on_gpu:
            return _verdict(stored, None, context_length(config), budget)
        weights = 4 * parameters
        loading = weights + (stored_bytes if weights != stored_bytes else 0)
        expanded = footprints.of_config(config, parameters, stored_bytes, weights, loading, 4)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    if expanded.least_bytes <= budget.bytes:
        return _verdict(expanded, None, context_length(config), budget)
    return _verdict(stored, expanded, context_length(config), budget)


def _verdict(
    held: Footprint, expanded: Footprint | None, longest: int | None, budget: Budget
) -> Fit:
    room = held.largest_context(budget.bytes - held.weight_bytes, MIN_CHUNK)
    limits = [limit for limit in (room, longest) if limit is not None]
    largest = min(limits, default=None)
    if held.least_bytes > budget.bytes:
        return Fit("does not fit", held, budget, _states(held, None), 0, "memory")
    return Fit(
        verdict="fits" if expanded is None else "fits, slowly",
        footprint=held,
        budget=budget,
        state_bytes=_states(held, longest),
        largest_context=largest,
        limited_by=None if largest is None else "memory" if largest == room else "model",
    )


def _states(held: Footprint, longest: int | None) -> dict[int, int]:
    lengths = [tokens for tokens in _CONTEXTS if longest is None or tokens < longest]
    if longest is not None:
        lengths.append(longest)
    return {tokens: held.state_bytes(tokens) for tokens in lengths}
