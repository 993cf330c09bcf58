"""Reads a checkpoint's config.json into a family's arguments, strictly where the math is at stake.

Two styles of the same fact are accepted: classic top-level keys (`rope_theta`, `rope_scaling`) and
the nested `rope_parameters` that transformers 5 writes. Where a file has both, the nested keys win,
as in transformers 5, and `rope_scaling` counts as nested. `null` means the default, or, for the
keys a family lists as `nullable`, that there is none.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

from mlxmodels.errors import ModelError

# MLX's sizes are 32-bit; no other number in a config comes near it.
_MAX_NUMBER = 2**31

MAX_WINDOW = 2**17
"""The longest sliding window that is believed."""

MAX_LAYERS = 2**12
"""The deepest model that is believed."""

# Keys of related architectures that would change the math, with the values that do not. A family
# that knows a key has it as a field.
FOREIGN_KEYS: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attn_scale": (),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_window_size": (),
    "attn_logit_softcapping": (0,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "layer_norm_epsilon": (),
    "logit_scale": (1,),
    "logit_softcap": (0,),
    "logits_scaling": (1,),
    "logits_soft_cap": (0,),
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "no_rope_layers": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("absolute", "rope", "rotary", "sinusoidal"),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_base": (),
    "rope_interleave": (False,),
    "rope_pct": (),
    "rope_scaling": (),
    "rotary_base": (),
    "rotary_dim": (),
    "rotary_emb_base": (),
    "rotary_pct": (),
    "rotary_percent": (),
    "rotary_percentage": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_alibi": (False,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class ModelArgs:
    """Base of every family's arguments; a subclass is a dataclass whose fields are config keys."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names under which published files carry a field."""

    ignored: ClassVar[tuple[str, ...]] = ()
    """Keys that would change the math of related families and mean nothing in this one's files."""

    nullable: ClassVar[tuple[str, ...]] = ("pad_token_id",)
    """Keys whose `null` says that there is none."""

    model_type: str = ""
    pad_token_id: int | None = None
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        layers = getattr(self, "num_hidden_layers", 0)
        if layers > MAX_LAYERS:  # building them would take for ever
            raise ModelError(
                f"config.json sets num_hidden_layers to {layers}, expected at most {MAX_LAYERS}."
            )
        if self.num_labels is not None:
            require_positive(self, "num_labels")
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise ModelError(
                f"config.json sets problem_type to {self.problem_type!r}, "
                f"expected one of {', '.join(_PROBLEM_TYPES)}."
            )

    @property
    def label_count(self) -> int:
        """Outputs of a classification head."""
        return self.num_labels or len(self.id2label or {}) or 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Arguments of a config; unknown keys are ignored unless they would change the math.

        Raises:
            ModelError: a value has the wrong type or an unsupported one; the key is named.
        """
        names = {field.name for field in fields(cls)}
        known = {k: v for k, v in config.items() if v is not None or k in cls.nullable}
        for alias, name in cls.aliases.items():
            if alias not in known:
                continue
            value = known.setdefault(name, known[alias])
            if value != known[alias] and alias not in cls.ignored:
                raise ModelError(
                    f"config.json sets {name} to {reprlib.repr(value)} and {alias} to "
                    f"{reprlib.repr(known[alias])}, which mean the same; remove one of them."
                )
        nested = rope_parameters(known)
        known.pop("rope_scaling", None)
        known |= nested
        own = {*names, *cls.aliases, *cls.ignored}
        for key, allowed in FOREIGN_KEYS.items():
            value = known.get(key)
            if key not in own and value is not None and value not in allowed:
                raise ModelError(
                    f"config.json sets {key} to {reprlib.repr(value)}, which "
                    f"{config.get('model_type')} models do not support here; "
                    f"use a checkpoint without it."
                )
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
        ModelError: they are not an object, or one per kind of layer.
    """
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    nested = config.get(source) or {}
    if not isinstance(nested, Mapping):
        raise ModelError(
            f"config.json sets {source} to {reprlib.repr(nested)}, expected an object."
        )
    for key, value in nested.items():
        if isinstance(value, Mapping):
            raise ModelError(
                f"config.json gives {source} of its own to {key!r}, which is not supported "
                f"here; use a checkpoint with one set of them."
            )
    classic = {
        key: nested[key]
        for key in ("rope_theta", "partial_rotary_factor")
        if nested.get(key) is not None
    }
    if _rope_type(nested) != "default":
        classic["rope_scaling"] = dict(nested)
    return classic


def rope_factor(args: Any, kinds: tuple[str, ...] = ("linear",)) -> tuple[str, float]:
    """Kind and factor of `rope_scaling`; "default" and 1 without it.

    Raises:
        ModelError: another kind than `kinds`, or a factor that is no number from 1 to a million.
    """
    scaling = args.rope_scaling
    kind = _rope_type(scaling)
    if kind == "default":
        return kind, 1.0
    if kind not in kinds:
        raise ModelError(
            f"config.json asks for rope_scaling of type {kind!r}; "
            f"{args.model_type} knows {' and '.join(map(repr, kinds))}."
        )
    factor = scaling.get("factor")
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 1 <= factor <= 1e6:
        raise ModelError(
            f"config.json sets the factor of rope_scaling to {reprlib.repr(factor)}, "
            f"expected a number from 1 to a million."
        )
    return kind, float(factor)


def require_positive(args: object, *names: str) -> None:
    """Refuse sizes that are not positive.

    Raises:
        ModelError: names the first offending key.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ModelError(f"config.json sets {name} to {value!r}, expected a positive number.")


def require_divisor(args: object, divisor: str, whole: str) -> None:
    """Refuse a size that another, positive one does not divide.

    Raises:
        ModelError: names both keys.
    """
    if getattr(args, whole) % getattr(args, divisor):
        raise ModelError(
            f"config.json sets {whole} to {getattr(args, whole)}, which {divisor} = "
            f"{getattr(args, divisor)} does not divide."
        )


def require_even(args: object, name: str) -> None:
    """Refuse an odd size where the rotary embedding halves it.

    Raises:
        ModelError: names the key.
    """
    if getattr(args, name) % 2:
        raise ModelError(
            f"config.json sets {name} to {getattr(args, name)}, expected an even number."
        )


def require_window(args: object, name: str) -> None:
    """Refuse a window whose ring, which is allocated whole, no real model has.

    Raises:
        ModelError: names the key.
    """
    if getattr(args, name) > MAX_WINDOW:
        raise ModelError(
            f"config.json sets {name} to {getattr(args, name)}, expected at most {MAX_WINDOW}."
        )


def softcap(args: object, name: str) -> float | None:
    """A cap of scores or logits; 0 and null both mean none.

    Raises:
        ModelError: it is negative.
    """
    cap = getattr(args, name)
    if cap:
        require_positive(args, name)
    return cap or None


def rotary_dims(args: Any) -> int:
    """Channels of a head that the rotary embedding turns, by `partial_rotary_factor`.

    Raises:
        ModelError: not an even number of them, or more than there are.
    """
    factor = args.partial_rotary_factor
    dims = int(args.head_dim * factor)
    if not 0 < factor <= 1 or dims % 2 or dims == 0:
        raise ModelError(
            f"config.json sets partial_rotary_factor to {factor}, which "
            f"does not turn an even part of {args.head_dim} channels."
        )
    return dims


def _rope_type(scaling: Any) -> str:
    if not isinstance(scaling, Mapping):
        return "default"
    unnamed = "without a name" if "factor" in scaling else "default"
    return str(scaling.get("rope_type", scaling.get("type", unnamed)))


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """Check a JSON value against a field's annotation; whole floats pass as integers."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    is_number = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_MAX_NUMBER < value < _MAX_NUMBER  # false for NaN
    )
    if value is None and type(None) in kinds:
        return None
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
