"""Reads a checkpoint's config.json into a family's arguments, strictly where the math is at stake.

Two styles of the same fact are accepted: classic top-level keys (`rope_theta`) and the nested
`rope_parameters` that transformers 5 writes. An explicit top-level key wins, then
`rope_parameters`, then the family's default; `null` always means "the default".
"""

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

from mlxmodels.errors import ModelError

# MLX's sizes are 32-bit; no other number in a config comes near it.
_MAX_NUMBER = 2**31


@dataclass
class ModelArgs:
    """Base of every family's arguments; a subclass is a dataclass whose fields are config keys."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names under which published files carry a field."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys of related architectures that would change the math, with the values that do not."""

    model_type: str = ""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Arguments of a config; unknown keys are ignored unless they would change the math.

        Raises:
            ModelError: a value has the wrong type or an unsupported one; the key is named.
        """
        for key, allowed in cls.neutral.items():
            value = config.get(key)
            if value is not None and value not in allowed:
                raise ModelError(
                    f"config.json sets {key} to {reprlib.repr(value)}, which "
                    f"{config.get('model_type')} models do not support here; "
                    f"use a checkpoint without it."
                )
        known = {key: value for key, value in config.items() if value is not None}
        for alias, name in cls.aliases.items():
            if alias in known:
                known.setdefault(name, known[alias])
        for key, value in rope_parameters(known).items():
            known.setdefault(key, value)
        arguments = {}
        for field in fields(cls):
            if field.name in known:
                arguments[field.name] = _typed(field.name, known[field.name], field.type)
            elif field.default is MISSING and field.default_factory is MISSING:
                raise ModelError(f"config.json has no {field.name}; the model cannot be built.")
        return cls(**arguments)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested rotary parameters under their classic names; `rope_scaling` only if not default.

    Raises:
        ModelError: `rope_parameters` is not an object.
    """
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise ModelError(f"config.json sets rope_parameters to {nested!r}, expected an object.")
    classic = {
        key: nested[key]
        for key in ("rope_theta", "partial_rotary_factor")
        if nested.get(key) is not None
    }
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        classic["rope_scaling"] = {**nested, "type": kind}
    return classic


def require_positive(args: object, *names: str) -> None:
    """Refuse sizes that are not positive.

    Raises:
        ModelError: names the first offending key.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ModelError(f"config.json sets {name} to {value!r}, expected a positive number.")


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """Check a JSON value against a field's annotation; whole floats pass as integers."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    is_number = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_MAX_NUMBER < value < _MAX_NUMBER  # false for NaN
    )
    if bool in plain and isinstance(value, bool):
        return value
    if int in plain and is_number and float(value).is_integer():
        return int(value)
    if float in plain and is_number:
        return float(value)
    if isinstance(value, tuple(k for k in plain if k in (str, list, dict))):
        return value
    expected = " or ".join(kind.__name__ for kind in plain if kind is not type(None))
    raise ModelError(f"config.json sets {name} to {reprlib.repr(value)}, expected {expected}.")
