"""llama.cpp's `samplers`: which of them are used. The others are off; the order is the engine's.

`infill` is taken as min_p of 0.2: llama.cpp's drops what is less likely than a fifth, and ours less
than a fifth of the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from app.server.validation import refuse, shown

_INFILL_MIN_P = 0.2
# What a sampler that is left out leaves the settings at.
_OFF: dict[str, dict[str, Any]] = {
    "penalties": {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    },
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}
_SAME = {"typical_p": "typ_p"}
_SAMPLERS = {*_OFF, *_SAME, "dry", "top_n_sigma", "infill"}


def _sampler(name: Any) -> str:
    if not isinstance(name, str) or name not in _SAMPLERS:
        known = ", ".join(sorted(_SAMPLERS))
        raise refuse(
            "invalid_value",
            f"{{path}} should be one of {known}, got {{value}}",
            value=shown(name),
        )
    return _SAME.get(name, name)


Samplers = list[
    Annotated[
        str,
        PlainValidator(_sampler),
        WithJsonSchema({"type": "string", "enum": sorted(_SAMPLERS)}),
    ]
]


def with_samplers(settings: dict[str, Any], samplers: Sequence[str] | None) -> dict[str, Any]:
    """Settings by the engine's names, those that belong to no sampler of the list off."""
    if samplers is None:
        return settings
    settings = dict(settings)
    for name, off in _OFF.items():
        if name not in samplers:
            settings |= off
    if "infill" in samplers:
        settings["min_p"] = max(settings.get("min_p") or 0.0, _INFILL_MIN_P)
    return settings
