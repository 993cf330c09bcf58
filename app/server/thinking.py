"""How a dialect's wish for reasoning becomes options of the model's chat template."""

from __future__ import annotations

from typing import Any

from app.engine.abilities import Abilities
from app.server.errors import ApiError

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Templates know three; what is more is the most of them."""


def thinking_options(
    abilities: Abilities, *, think: bool | None, effort: str | None = None, field: str
) -> dict[str, Any]:
    """Template options for reasoning as it is wished; nothing for what a template has no option of.

    Args:
        think: Whether to; None leaves it to the model.
        effort: One of low, medium, high, xhigh and max, for a template that has a word for it.
        field: Who asks, for the error.

    Raises:
        ApiError: 400, there is to be no reasoning and the template always begins with it.
    """
    options: dict[str, Any] = {}
    if think is not None and abilities.switch:
        options[abilities.switch] = think
    elif think is False and abilities.thinks_unasked:
        raise ApiError(
            400,
            "unsupported_value",
            f"This model always reasons before it answers: its chat template has no option to "
            f"turn that off. Leave `{field}` out, or choose another model.",
            param=field,
        )
    if effort is not None and abilities.effort:
        options[abilities.effort] = _EFFORTS[effort]
    return options
