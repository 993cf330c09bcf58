"""What a model takes in memory, term by term, and whether that is there: for `gryphon show --fit`
and before a pull."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterable

from app.cli.terminal import one_line
from app.engine.client import EngineClient
from app.engine.protocol import EngineStatus
from app.errors import GryphonError
from app.library.fit import Budget, Fit, estimated_budget, fit
from app.library.installed import InstalledModel
from app.machine import binary_bytes

_BASES = {
    "formula": "computed from config.json",
    "estimate": "an estimate: mlx-lm's states of this family are known once it is loaded",
    "measured": "measured",
}


def show_fit(model: InstalledModel, *, as_json: bool) -> int:
    """Print the arithmetic of one model; exits with 1 when it does not fit."""
    answer = fit(model, current_budget())
    if as_json:
        print(json.dumps({"name": model.name} | fit_as_json(answer), indent=2))
    else:
        print(in_columns(fit_rows(model.name, answer)))
    return 1 if answer.verdict == "does not fit" else 0


def current_budget() -> Budget:
    """The running engine's own, else an estimate."""
    return asyncio.run(_budget())


async def _budget() -> Budget:
    client = EngineClient()
    try:
        status = await client.status()
    except GryphonError:  # another version, or it does not answer: no reason not to estimate
        status = None
    finally:
        await client.close()
    estimate = estimated_budget()
    if not isinstance(status, EngineStatus) or not status.budget_bytes:
        return estimate
    return dataclasses.replace(
        estimate, bytes=status.budget_bytes, source="what the running engine has"
    )


def fit_rows(name: str, answer: Fit) -> list[tuple[str, str]]:
    """The terms and the verdict, for people."""
    held = answer.footprint
    how = "as stored"
    if held.weight_bytes != held.stored_bytes:
        how = f"as float32, {binary_bytes(held.stored_bytes)} as stored"
        if held.loading_bytes > held.weight_bytes:
            how += f"; {binary_bytes(held.loading_bytes)} while it loads"
    return [
        ("weights", f"{binary_bytes(held.weight_bytes)}, {how}"),
        *(
            (f"state at {tokens}", binary_bytes(nbytes))
            for tokens, nbytes in answer.state_bytes.items()
        ),
        ("computing", f"{binary_bytes(answer.scratch_bytes)} at least"),
        ("budget", f"{binary_bytes(answer.budget.bytes)}: {answer.budget.source}"),
        ("figures", _BASES[held.basis]),
        ("verdict", f"{name} {_verdict(answer)}"),
    ]


def in_columns(rows: Iterable[tuple[str, str]]) -> str:
    """A fact a line."""
    return "\n".join(f"{name:<16} {one_line(value)}" for name, value in rows)


def _verdict(answer: Fit) -> str:
    least = binary_bytes(answer.footprint.least_bytes)
    if answer.verdict == "does not fit":
        return f"does not fit: it takes {least} at least"
    if answer.largest_context is None:
        return f"{answer.verdict}, with a context of any length"
    why = "memory sets" if answer.limited_by == "memory" else "the model sets"
    return f"{answer.verdict}, with a context of {answer.largest_context} tokens, which {why}"


def fit_as_json(answer: Fit) -> dict[str, object]:
    """The same for programs."""
    held = answer.footprint
    return {
        "verdict": answer.verdict,
        "largest_context": answer.largest_context,
        "limited_by": answer.limited_by,
        "parameters": held.parameters,
        "stored_bytes": held.stored_bytes,
        "weight_bytes": held.weight_bytes,
        "loading_bytes": held.loading_bytes,
        "least_bytes": held.least_bytes,
        "scratch_bytes": answer.scratch_bytes,
        "bytes_per_token": held.bytes_per_token,
        "fixed_state_bytes": held.fixed_bytes,
        "state_bytes": answer.state_bytes,
        "basis": held.basis,
        "budget_bytes": answer.budget.bytes,
        "budget_source": answer.budget.source,
    }
