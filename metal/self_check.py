"""Every kernel, in the variants that models meet, for a report on this machine.

The dispatch checks a variant when a process first needs it; here are all of them at once, and each
op at the size a model gives it. Nothing is computed before it is asked for.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import mlx.core as mx

from metal.attention_kernel import LOCAL_ATTENTION, LOCAL_ATTENTION_DECODE
from metal.conv_kernel import CAUSAL_CONV1D
from metal.dispatch import Op, Unsupported
from metal.norm_kernel import RMS_NORM_1P
from metal.scan_kernel import BLOCK_RG_LRU, LINEAR_SCAN, RG_LRU

Arguments = tuple[Any, ...]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# RecurrentGemma 2B's: width of the recurrence, heads, taps of the convolution, keys a query sees.
_E, _HEADS, _K, _W = 2560, 10, 4, 2048

_WIDE = "float32 parameter"


@dataclass(frozen=True)
class Case:
    """One op at one size, with the variants of its kernel that belong to it."""

    op: Op
    size: str
    build: Callable[..., Arguments]
    """build(dtype, *shape, given): arguments of the op; `given` names optional ones."""
    axes: str
    """Names of the numbers in a shape."""
    shapes: tuple[tuple[int, ...], ...]
    """The first is the size; the others need other variants."""
    options: tuple[tuple[str, ...], ...]
    """Sets of optional arguments; a model gives the first."""

    def arguments(self, dtype: mx.Dtype) -> Arguments:
        """What a model calls the op with."""
        return self.build(dtype, *self.shapes[0], self.options[0])

    def variants(self) -> Iterator[tuple[str, Hashable]]:
        """Each variant that the kernel takes, in words and for `Op.check`; no variant twice."""
        seen = set()
        for (name, dtype), shape, given in product(DTYPES.items(), self.shapes, self.options):
            try:
                variant = self.op.variant(*self.build(dtype, *shape, given))
            except Unsupported:
                continue
            if variant not in seen:
                seen.add(variant)
                sizes = [f"{axis} {n}" for axis, n in zip(self.axes.split(), shape, strict=True)]
                yield ", ".join([name, " ".join(sizes), *given]), variant

    def check_at_size(self, arguments: Arguments) -> str | None:
        """As `Op.check`, of these arguments instead of a small case."""
        op = replace(self.op, sample=lambda _: arguments)
        return op.check(op.variant(*arguments))


def _values(shape: tuple[int, ...], dtype: mx.Dtype, seed: int, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)


def _parameter(dtype: mx.Dtype, given: tuple[str, ...]) -> mx.array:
    """[E]; models keep these wider than their matrices, or not."""
    return _values((_E,), mx.float32 if _WIDE in given else dtype, 4)


def _state(B: int, T: int, given: tuple[str, ...]) -> Arguments:
    return (_values((B, _E), mx.float32, 5) if "h0" in given else None, *_rows(B, T, given))


def _rows(B: int, T: int, given: tuple[str, ...]) -> Arguments:
    return (
        T - mx.arange(B) if "lengths" in given else None,
        mx.arange(B * T).reshape(B, T) % 100 == 0 if "reset" in given else None,
    )


def _linear_scan(dtype: mx.Dtype, B: int, T: int, given: tuple[str, ...]) -> Arguments:
    x = _values((B, T, _E), dtype, 0)
    a = mx.sigmoid(_values((B, T, _E), dtype, 1) + 2)
    return (x, a, *_state(B, T, given))


def _rg_lru(dtype: mx.Dtype, B: int, T: int, given: tuple[str, ...]) -> Arguments:
    x, *gates = (_values((B, T, _E), dtype, seed) for seed in range(3))
    return (x, *gates, _parameter(dtype, given), *_state(B, T, given))


def _block_rg_lru(dtype: mx.Dtype, B: int, T: int, given: tuple[str, ...]) -> Arguments:
    block = _E // _HEADS
    gates = [
        _values(shape, dtype, seed, block**-0.5)
        for seed in (1, 2)
        for shape in ((_HEADS, block, block), (_HEADS, block))
    ]
    x = _values((B, T, _E), dtype, 0)
    return (x, *gates, _parameter(dtype, given), *_state(B, T, given))


def _causal_conv1d(dtype: mx.Dtype, B: int, T: int, given: tuple[str, ...]) -> Arguments:
    u, state = _values((B, T, _E), dtype, 0), _values((B, _K - 1, _E), dtype, 3)
    weight = _values((_E, _K), dtype, 1)
    return (u, weight, _parameter(dtype, given), state, *_rows(B, T, given))


def _rms_norm_1p(dtype: mx.Dtype, B: int, T: int, given: tuple[str, ...]) -> Arguments:
    return (_values((B, T, _E), dtype, 0), _parameter(dtype, given), 1e-6)


def _local_attention(
    dtype: mx.Dtype, H: int, Hkv: int, D: int, T: int, S: int, given: tuple[str, ...]
) -> Arguments:
    q = _values((1, H, T, D), dtype, 0)
    k, v = (_values((1, Hkv, S, D), dtype, seed) for seed in (1, 2))
    return (
        *(q, k, v, D**-0.5, _W),
        50.0 if "softcap" in given else None,
        mx.array([3]) if "key_start" in given else None,
        mx.array([T]) if "lengths" in given else None,
    )


def _local_attention_decode(
    dtype: mx.Dtype, H: int, Hkv: int, D: int, W: int, given: tuple[str, ...]
) -> Arguments:
    q = _values((1, H, 1, D), dtype, 0)
    k, v = (_values((1, Hkv, W, D), dtype, seed) for seed in (1, 2))
    softcap = 50.0 if "softcap" in given else None
    return (q, k, v, mx.array([3 * W]), D**-0.5, W, softcap)


# The engine prefills 512 tokens at a time. Two rows take another number of threads per channel than
# one, and so do few tokens.
_PROMPTS = ((1, 512), (2, 512), (1, 5))
_STEP = ((1, 1),)
_RECURRENT = (("h0",), (), ("h0", "lengths", "reset"))
_GATED = (*_RECURRENT, ("h0", _WIDE))
_CONV = ((), ("lengths", "reset"), (_WIDE,))
_NORM = ((), (_WIDE,))

# H Hkv D T S: the window is full, as in a long prompt; then the head dims, and few queries, whose
# keys are split among threadgroups or not.
_CACHED = 512 + _W - 1
_QUERIES = (
    (_HEADS, 1, 256, 512, _CACHED),
    *((8, 4, D, 512, _CACHED) for D in (64, 96, 128)),
    (_HEADS, 1, 256, 4, _W),
    (8, 4, 64, 4, 40),
)
# H Hkv D W, as above; the heads that share keys and the head dim say how many a threadgroup takes.
_RINGS = (
    (_HEADS, 1, 256, _W),
    (16, 1, 256, _W),
    (8, 4, 256, _W),
    (32, 16, 128, _W),
    (8, 4, 96, _W),
    (8, 4, 64, 40),
)
_MASKS = ((), ("key_start",), ("key_start", "lengths"))
_CAPPED = tuple(("softcap", *masks) for masks in _MASKS)

CASES = (
    Case(LINEAR_SCAN, "512 tokens", _linear_scan, "B T", _PROMPTS, _RECURRENT),
    Case(RG_LRU, "512 tokens", _rg_lru, "B T", _PROMPTS, _GATED),
    Case(RG_LRU, "1 token", _rg_lru, "B T", _STEP, _GATED),
    Case(BLOCK_RG_LRU, "512 tokens", _block_rg_lru, "B T", _PROMPTS, _GATED),
    Case(BLOCK_RG_LRU, "1 token", _block_rg_lru, "B T", _STEP, _GATED),
    Case(CAUSAL_CONV1D, "512 tokens", _causal_conv1d, "B T", ((1, 512),), _CONV),
    Case(CAUSAL_CONV1D, "1 token", _causal_conv1d, "B T", _STEP, _CONV),
    Case(RMS_NORM_1P, "512 tokens", _rms_norm_1p, "B T", ((1, 512),), _NORM),
    Case(RMS_NORM_1P, "1 token", _rms_norm_1p, "B T", _STEP, _NORM),
    *(
        Case(
            LOCAL_ATTENTION,
            f"512 tokens{capped}",
            _local_attention,
            "H Hkv D T S",
            _QUERIES,
            given,
        )
        for capped, given in (("", _MASKS), (", softcap", _CAPPED))
    ),
    *(
        Case(
            LOCAL_ATTENTION_DECODE,
            f"1 token{capped}",
            _local_attention_decode,
            "H Hkv D W",
            _RINGS,
            (given,),
        )
        for capped, given in (("", ()), (", softcap", ("softcap",)))
    ),
)
