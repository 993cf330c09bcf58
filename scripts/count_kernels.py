"""Launches and bytes of the Metal kernels, counted where there is no Mac; docs/kernels.md's tables.

    .venv/bin/python scripts/count_kernels.py                  # writes the tables, seconds
    .venv/bin/python scripts/count_kernels.py --check          # writes nothing, 1 if they differ
    .venv/bin/python scripts/count_kernels.py --json f.json    # the figures too, for a test

Launches: a layer is traced as MLX would run it on an Apple GPU, kernels included, at the size of
RecurrentGemma 2B, and every operation of the graph counts by RULES. mlx-lm's port of the layer
counts by the same rules. Nothing is evaluated.

Bytes: the kernels run on the Metal host of the tests, which sees every load and store.

The status is 1 where a goal is missed, or with --check where the document differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

# In a trace MLX takes compiled functions and mx.fast.rms_norm apart, as a CPU would run them. On
# Metal each is one launch, so each leaves one kernel without a body in the trace instead. Both are
# replaced here, before anything that uses them is imported.
_MARK = "mark_"
_is_tracing = False
_compile = mx.compile
_rms_norm = mx.fast.rms_norm
_metal_kernel = mx.fast.metal_kernel


@contextmanager
def _tracing(now: bool) -> Iterator[None]:
    global _is_tracing
    before, _is_tracing = _is_tracing, now
    try:
        yield
    finally:
        _is_tracing = before


def _mark(name: str, inputs: Sequence[mx.array], like: Any) -> Any:
    """Arrays shaped as `like`, made of the inputs in one launch of that name."""
    outputs = [like] if isinstance(like, mx.array) else list(like)
    kernel: Any = _metal_kernel(
        name=_MARK + name,
        input_names=[f"x{i}" for i in range(len(inputs))],
        output_names=[f"y{i}" for i in range(len(outputs))],
        source="// of any kind",
        ensure_row_contiguous=name == "RMSNorm",
    )
    made = kernel(
        inputs=list(inputs),
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[y.shape for y in outputs],
        output_dtypes=[y.dtype for y in outputs],
    )
    return made[0] if isinstance(like, mx.array) else tuple(made)


def _marked_compile(function: Any, *options: Any, **named: Any) -> Any:
    compiled: Any = _compile(function, *options, **named)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not _is_tracing:
            return compiled(*arguments)
        with _tracing(False):
            is_one = _fuses(compiled, arguments)
            like = function(*arguments) if is_one else None
        if not is_one:
            return function(*arguments)
        return _mark("Compiled", [a for a in arguments if isinstance(a, mx.array)], like)

    return call


def _fuses(compiled: Any, arguments: Sequence[Any]) -> bool:
    """Whether MLX makes one kernel of a compiled function, as its own graph says."""
    zeros = [mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a for a in arguments]
    made = [name for name in _dot(compiled(*zeros)) if name not in ("Full", "Broadcast")]
    return len(made) == 1 and made[0].startswith("Compiled")


def _marked_rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    if not _is_tracing:
        return _rms_norm(x, weight, eps)
    like = _rms_norm(x, weight, eps)
    # The inputs are made of one dtype in launches of their own.
    normed: mx.array = _mark("RMSNorm", [x.astype(like.dtype), weight.astype(like.dtype)], like)
    return normed


mx.compile = _marked_compile  # type: ignore[assignment]
mx.fast.rms_norm = _marked_rms_norm  # type: ignore[assignment]

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models import recurrent_gemma as theirs  # noqa: E402

import metal  # noqa: E402
from metal import build, dispatch  # noqa: E402
from mlxmodels import recurrent_gemma  # noqa: E402
from mlxmodels.attention import Call  # noqa: E402
from mlxmodels.cache import RecurrentState  # noqa: E402
from tests import metal_host  # noqa: E402

TARGET = ROOT / "docs" / "kernels.md"

# RecurrentGemma 2B: width, heads, width of the MLP, taps of the convolution, window.
E, HEADS, MLP, K, WINDOW = 2560, 10, 7680, 4, 2048
CHUNK = 64
"""Tokens of a prefill whose launches are counted."""

GOALS = {"decode": 14, "prefill": 18}
"""Launches of a recurrent layer with float weights."""
SCAN_GOAL, ATTENTION_GOAL = 1.1, 1.3
"""Bytes over the least; of attention over what its tiles must read."""

# A chip's bandwidth is reached to 85 % by kernels that only move data; a launch that waits for the
# one before it takes 2.5 microseconds (3,200 in 7.7 to 8.8 ms on an M3 Ultra, ml-explore/mlx#4521).
BANDWIDTH = 0.85
LAUNCH_S = 2.5e-6
CHIPS = {68: "M1", 120: "M4", 273: "M4 Pro", 546: "M4 Max", 819: "M3 Ultra"}


@dataclass(frozen=True)
class Rule:
    """Launches of some operations, and why: read in ml-explore/mlx at 846d176 (0.32.2)."""

    operations: tuple[str, ...]
    launches: int
    why: str


VIEWS = (
    *("Transpose", "Slice", "Broadcast", "ExpandDims", "Squeeze", "Split"),
    *("Reshape", "Flatten", "Unflatten"),
)
ELEMENTWISE = (
    *("Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "LogAddExp"),
    *("Exp", "Expm1", "Sqrt", "Square", "Sigmoid", "Tanh", "Select", "AsType", "Equal"),
)
RULES = (
    Rule(
        VIEWS,
        0,
        "share the buffer (`gpu/primitives.cpp`, `common/common.cpp`); the last three are a copy, "
        "one launch, where the strides do not allow it (`prepare_reshape`)",
    ),
    Rule(ELEMENTWISE, 1, "`metal/binary.cpp`, `unary.cpp`, `ternary.cpp`, `gpu/copy.cpp`"),
    Rule(
        ("Matmul", "AddMM", "QuantizedMatmul"),
        1,
        "`metal/matmul.cpp`, `quantized.cpp`; one more for an operand whose rows are not "
        "contiguous, and for a single row that is one of a transposed array (`check_transpose`)",
    ),
    Rule(
        ("CustomKernel",),
        1,
        "`metal/custom_kernel.cpp`; one more for each input that is not contiguous",
    ),
    Rule(
        ("Compiled",),
        1,
        "a function under `mx.compile` of which MLX's own graph shows one fused kernel; any other "
        "counts operation by operation (`metal/compiled.cpp`)",
    ),
    Rule(("RMSNorm",), 1, "`mx.fast.rms_norm`, `metal/normalization.cpp`"),
    Rule(("Convolution",), 1, "depthwise in one dimension, `depthwise_conv_1D_gpu`"),
    Rule(("Arange", "Full"), 1, "made on the GPU in every call; `mx.array` of Python values: 0"),
    Rule(
        ("SliceUpdate",),
        1,
        "into the buffer it is given if nobody else holds that, else a copy more "
        "(`metal/indexing.cpp`)",
    ),
    Rule(("Pad",), 2, "a fill and a copy, `pad_gpu`"),
)
CONCATENATE = "one per input (`concatenate_gpu`)"
LAUNCHES = {name: rule.launches for rule in RULES for name in rule.operations}


Layout: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
"""Shape and strides, in elements, of an array that is never read."""
_NOTHING = np.empty(1, dtype=np.uint8)


@dataclass
class Cost:
    """What a traced function starts and moves."""

    launches: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    """Launches that only lay an array out anew, by the operation that needs it."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Of every launch's inputs and outputs, each once."""

    @property
    def total(self) -> int:
        return self.launches.total() + self.copies.total()

    def without(self, names: Sequence[str]) -> Cost:
        """The rest, once these operations and the copies that they need are gone."""

        def rest(counts: Counter[str]) -> Counter[str]:
            return Counter({name: n for name, n in counts.items() if name not in names})

        return Cost(rest(self.launches), rest(self.copies), rest(self.bytes))

    def seconds(self, gigabytes_per_s: float) -> float:
        return self.bytes.total() / (BANDWIDTH * gigabytes_per_s * 1e9) + self.total * LAUNCH_S


def count(function: Callable[..., Any], *arrays: mx.array) -> Cost:
    """The launches of function(*arrays) on Metal.

    Raises:
        RuntimeError: no rule covers an operation or a layout, or MLX merged operations in its
            trace that it would run twice.
    """
    names: list[str] = []
    events: list[dict[str, Any]] = []

    def call(*traced: mx.array) -> list[mx.array]:
        with _tracing(True):
            flat: Any = tree_flatten(function(*traced))
            outputs = [y for _, y in flat]
        names.extend(_dot(outputs))
        return outputs

    mx.export_function(events.append, call, *arrays)
    nodes = [event for event in events if event["type"] == "primitive"]
    merged = Counter(names) - Counter(node["name"] for node in nodes)
    if any(LAUNCHES.get(name) != 0 for name in merged):
        raise RuntimeError(f"merged in the trace, and not by MLX outside of it: {dict(merged)}.")

    graph = _Graph(events)
    for node in nodes:
        graph.add(node)
    return graph.cost


class _Graph:
    """What is known of a traced graph's arrays on the way through it, by their names."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self.cost = Cost()
        self._layouts: dict[str, Layout] = {}
        self._uses: Counter[str] = Counter()
        self._owned: set[str] = set()
        """Arrays in buffers that nobody but the operation which takes them holds."""
        for event in events:
            kind = event["type"]
            if kind == "inputs":
                shapes = [(name, shape) for name, shape, _ in event["inputs"]]
            else:
                shapes = [(name, value.shape) for name, value in event.get("constants", ())]
            self._layouts |= {name: _row_contiguous(shape) for name, shape in shapes}
            used = event["outputs"] if kind == "outputs" else ()
            used = event["inputs"] if kind == "primitive" else used
            self._uses.update(name for name, _, _ in used)

    def add(self, node: dict[str, Any]) -> None:
        if node["name"] in VIEWS:
            self._add_view(node)
        else:
            self._add_launches(node)

    def _add_view(self, node: dict[str, Any]) -> None:
        kind, (source, _, dtype) = node["name"], node["inputs"][0]
        shapes = [shape for _, shape, _ in node["outputs"]]
        is_owned = source in self._owned and len(shapes) == 1
        views = _views(kind, self._layouts[source], node["arguments"], shapes)
        for (name, shape, _), view in zip(node["outputs"], views, strict=True):
            if view is None:
                self.cost.copies[kind] += 1
                self.cost.bytes[kind] += 2 * prod(shape) * dtype.size
            layout = _row_contiguous(shape) if view is None else view
            self._store(name, layout, is_owned or view is None)

    def _add_launches(self, node: dict[str, Any]) -> None:
        kind = node["name"]
        inputs = [self._layouts[name] for name, _, _ in node["inputs"]]
        dtypes = [dtype for _, _, dtype in node["inputs"]]
        moved = [_distinct(a) * d.size for a, d in zip(inputs, dtypes, strict=True)]
        made = [prod(shape) * dtype.size for _, shape, dtype in node["outputs"]]
        copied: list[int] = []
        if kind in ELEMENTWISE:
            several = [a for a in inputs if _distinct(a) > 1]
            if several and all(_is_dense(a) and not a.flags.c_contiguous for a in several):
                raise RuntimeError(f"{kind} of transposed arrays, whose layout it would keep.")
        elif kind == "SliceUpdate":
            if node["inputs"][0][0] not in self._owned:
                copied = made
            moved, made = moved[1:], moved[1:]
        else:
            needs = zip(moved, _needs_copies(node, inputs), strict=False)
            copied = [size for size, is_copied in needs if is_copied]

        if kind == "CustomKernel":
            kind = _kernel_name(node["arguments"][0])
        self.cost.launches[kind] += _launches(node)
        self.cost.copies[kind] += len(copied)
        self.cost.bytes[kind] += sum(moved) + sum(made) + 2 * sum(copied)
        for name, shape, _ in node["outputs"]:
            self._store(name, _row_contiguous(shape), True)

    def _store(self, name: str, layout: Layout, is_owned: bool) -> None:
        self._layouts[name] = layout
        if is_owned and self._uses[name] == 1:
            self._owned.add(name)


def _launches(node: dict[str, Any]) -> int:
    name: str = node["name"]
    if name == "Concatenate":
        return len(node["inputs"])
    if name not in LAUNCHES:
        raise RuntimeError(f"no rule covers {name}.")
    return LAUNCHES[name]


def _views(
    name: str, x: Layout, arguments: list[Any], shapes: list[tuple[int, ...]]
) -> list[Layout | None]:
    """An array as the operation sees it, or None where it has to be copied."""
    if name == "Transpose":
        return [x.transpose(arguments[0])]
    if name == "Slice":
        return [x[tuple(map(slice, *arguments))]]
    if name == "Broadcast":
        return [np.broadcast_to(x, shapes[0])]
    if name == "ExpandDims":
        return [np.expand_dims(x, arguments[0])]
    if name == "Squeeze":
        return [np.squeeze(x, tuple(arguments[0]))]
    if name == "Split":
        return list(np.split(x, arguments[0], axis=arguments[1]))
    try:
        return [x.reshape(shapes[0], copy=False)]
    except ValueError:
        return [None]


def _needs_copies(node: dict[str, Any], inputs: list[Layout]) -> list[bool]:
    """Which inputs an operation copies first, because it cannot follow their strides."""
    name = node["name"]
    if name in ("Matmul", "AddMM"):
        M, N = inputs[0].shape[-2], inputs[1].shape[-1]
        return [_is_odd_matrix(inputs[0], M == 1), _is_odd_matrix(inputs[1], N == 1)]
    if name == "Convolution" or (name == "CustomKernel" and node["arguments"][9]):
        return [not a.flags.c_contiguous for a in inputs]
    if name == "QuantizedMatmul":
        return [_is_odd_matrix(a, False) or a.strides[-1] != 1 for a in inputs]
    return []


def _is_odd_matrix(a: Layout, is_vector: bool) -> bool:
    """`check_transpose` of mlx/backend/metal/matmul.cpp; a row of a transposed array is odd too."""
    rows, columns = a.strides[-2:]
    if columns == 1 and (not is_vector or rows == a.shape[-1]):
        return False
    return not (rows == 1 and (not is_vector or columns == a.shape[-2]))


def _row_contiguous(shape: Sequence[int]) -> Layout:
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(_NOTHING, shape, strides)


def _is_dense(a: Layout) -> bool:
    """Whether the elements fill a piece of memory, in some order."""
    last = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True))
    return bool(last + 1 == a.size)


def _distinct(a: Layout) -> int:
    """Elements in memory: those of a broadcast axis are one."""
    return prod(n for n, s in zip(a.shape, a.strides, strict=True) if s)


def _dot(outputs: Any) -> list[str]:
    """Names of the operations that lead to the outputs, as MLX would run them."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, outputs)
        return re.findall(r'\[label ="(\w+)", shape=rectangle\]', Path(file.name).read_text())


def _kernel_name(function: str) -> str:
    name = function.removeprefix("custom_kernel_")
    if name.startswith(_MARK):
        return name.removeprefix(_MARK).split("_")[0]
    known = [path.stem for path in build.KERNELS.glob("*.metal") if name.startswith(path.stem)]
    return max(known, key=len)


PHASES = {
    "decode": (1, True),
    "prefill, first chunk": (CHUNK, False),
    "prefill, later chunk": (CHUNK, True),
}
DTYPES = {
    "float32": (mx.float32, False),
    "bfloat16": (mx.bfloat16, False),
    "4-bit": (mx.bfloat16, True),
}
"""Of activations and of what is not packed; whether linears are packed in 4 bits."""


def our_layer(tokens: int, has_state: bool, dtype: mx.Dtype, is_packed: bool) -> Cost:
    arguments = recurrent_gemma.ModelArgs(
        hidden_size=E,
        intermediate_size=2 * MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        conv1d_width=K,
    )
    layer = recurrent_gemma.Block(arguments, "recurrent")

    def run(x: mx.array, *state: mx.array) -> list[Any]:
        cache = RecurrentState()
        if state:
            cache.state = (*state, [WINDOW], None)
        return [layer(x, cache, Call()), cache.conv, cache.hidden]

    state = [mx.zeros((1, K - 1, E), dtype), mx.zeros((1, E))] if has_state else []
    return count_module(layer, run, [mx.zeros((1, tokens, E), dtype), *state], dtype, is_packed)


def their_layer(tokens: int, has_state: bool, dtype: mx.Dtype, is_packed: bool) -> Cost:
    layer = theirs.ResidualBlock(E, 2 * MLP, HEADS, WINDOW, "recurrent")

    def run(x: mx.array, *state: mx.array) -> list[Any]:
        cache: list[mx.array | None] = [*state] or [None, None]
        return [layer(x, cache), *cache]

    state = [mx.zeros((1, K - 1, E), dtype), mx.zeros((1, E), dtype)] if has_state else []
    return count_module(layer, run, [mx.zeros((1, tokens, E), dtype), *state], dtype, is_packed)


def our_recurrence(tokens: int) -> Cost:
    layer = recurrent_gemma.RGLRU(E, HEADS)

    def run(x: mx.array, h0: mx.array) -> Any:
        return layer(x, h0, None, None)

    arrays = [mx.zeros((1, tokens, E), mx.bfloat16), mx.zeros((1, E))]
    return count_module(layer, run, arrays, mx.bfloat16).without(["Matmul"])


def their_recurrence(tokens: int) -> Cost:
    layer = theirs.RGLRU(E, HEADS)
    arrays = [mx.zeros((1, tokens, E), mx.bfloat16), mx.zeros((1, E), mx.bfloat16)]
    return count_module(layer, layer, arrays, mx.bfloat16).without(["Matmul"])


def count_module(
    module: Any,
    run: Callable[..., Any],
    arrays: Sequence[mx.array],
    dtype: mx.Dtype,
    is_packed: bool = False,
) -> Cost:
    """The cost of run(*arrays), which calls the module, with its weights in a dtype or packed."""
    module.set_dtype(dtype)
    if is_packed:
        nn.quantize(module, group_size=64, bits=4)
    parameters: Any = tree_flatten(module.parameters())
    names, weights = zip(*parameters, strict=True)

    def call(*traced: mx.array) -> Any:
        module.update(tree_unflatten(list(zip(names, traced, strict=False))))
        return run(*traced[len(names) :])

    return count(call, *weights, *arrays)


@dataclass
class Traffic:
    """What one launch of a kernel moved."""

    kernel: str
    shape: str
    dtype: str
    options: str
    sizes: dict[str, int]
    """Bytes of every buffer; inputs in the constant address space, below 8 elements, left out."""
    read: dict[str, int]
    written: dict[str, int]
    threadgroups: int
    threads: int
    threadgroup_bytes: int
    barriers: int
    """Of one threadgroup, on average."""
    tiled: int | None = None
    """What the tiles of attention must read and write, if not `least`."""

    @property
    def least(self) -> int:
        return sum(self.sizes.values())

    @property
    def moved(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def again(self) -> dict[str, float]:
        """Inputs of which more is read than there is, and how many times over."""
        times = {name: n / self.sizes[name] for name, n in self.read.items()}
        return {name: ratio for name, ratio in times.items() if ratio > 1}

    @property
    def ratio(self) -> float:
        """Of what is moved to what must be."""
        return self.moved / (self.tiled or self.least)

    @property
    def goal(self) -> float | None:
        if self.kernel == "local_attention":
            return ATTENTION_GOAL
        return SCAN_GOAL if self.kernel in ("linear_scan", "rg_lru") else None


def measure(
    op: Callable[..., Any], shape: str, arrays: dict[str, Any], options: str = ""
) -> list[Traffic]:
    """What each kernel of an op moves."""
    calls: list[list[mx.array]] = []
    with metal_host.install(schedules=["forward"]) as host:
        run = host.run

        def noting(
            name: str, kernel: Any, output_names: Sequence[str], call: dict[str, Any]
        ) -> list[mx.array]:
            inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in call["inputs"]]
            outputs = run(name, kernel, output_names, call)
            calls.append([*inputs, *outputs])
            return outputs

        host.run = noting  # type: ignore[method-assign]
        mx.eval(op(**arrays, backend="metal"))
    found = []
    for report, launch, values in zip(host.reports, host.launches, calls, strict=True):
        buffers = [p for p in launch.parameters if p.space and not p.name.endswith(_METADATA)]
        sizes = {
            p.name: x.nbytes for p, x in zip(buffers, values, strict=True) if p.space == "device"
        }
        found.append(
            Traffic(
                kernel=report.kernel,
                shape=shape,
                dtype=str(values[0].dtype).removeprefix("mlx.core."),
                options=options,
                sizes=sizes,
                read={name: n for name, n in report.bytes_read.items() if n and name in sizes},
                written={name: n for name, n in report.bytes_written.items() if n},
                threadgroups=report.threadgroups,
                threads=prod(report.threadgroup),
                threadgroup_bytes=report.threadgroup_bytes,
                barriers=report.barriers // report.threadgroups,
            )
        )
    return found


_METADATA = ("_shape", "_strides", "_ndim")


def wave(*shape: int, dtype: mx.Dtype = mx.float32, frequency: float = 1) -> mx.array:
    return mx.sin(frequency * mx.arange(prod(shape))).reshape(shape).astype(dtype)


def collect_traffic() -> Iterator[Traffic]:
    half = mx.bfloat16
    for B, T, width in ((1, 512, 256), (2, 500, 100)):
        for dtype in (mx.float32, half):
            for with_reset in (False, True):
                yield from scans(B, T, width, dtype, with_reset)
    yield from scans(1, 1, E, half, False)
    x, h0 = wave(1, 1, E, dtype=half), wave(1, E)
    yield from measure(metal.block_rg_lru, f"1 x 1 x {E}", {"x": x, **gates(half), "h0": h0}, "h0")
    for T, width in ((512, 256), (1, E)):
        arrays = {
            "u": wave(1, T, width, dtype=half),
            "weight": wave(width, K, dtype=half),
            "bias": wave(width, dtype=half),
            "state": wave(1, K - 1, width, dtype=half),
        }
        yield from measure(metal.causal_conv1d, f"1 x {T} x {width}", arrays)
    for T in (64, 1):
        norm = {"x": wave(1, T, E, dtype=half), "weight": wave(E, dtype=half), "eps": 1e-6}
        yield from measure(metal.rms_norm_1p, f"1 x {T} x {E}", norm)
    yield from attention(4, 1, 256, 128, 64, half)
    yield from attention(2, 2, 64, 256, 100, mx.float32)
    yield from attention_step(HEADS, 1, E // HEADS, WINDOW, half)


def scans(B: int, T: int, width: int, dtype: mx.Dtype, with_reset: bool) -> Iterator[Traffic]:
    shape, options = f"{B} x {T} x {width}", "h0, reset" if with_reset else "h0"
    x, a, b = (wave(B, T, width, dtype=dtype, frequency=f) for f in (1, 2, 3))
    state = {"h0": wave(B, width)}
    if with_reset:
        state["reset"] = (mx.arange(B * T) % 100 == 50).reshape(B, T)
    if T > 1:
        yield from measure(metal.linear_scan, shape, {"x": x, "a": mx.abs(a), **state}, options)
    parameter = wave(width, dtype=dtype, frequency=4)
    gated = {"x": x, "input_gate": a, "recurrent_gate": b, "recurrent_param": parameter}
    yield from measure(metal.rg_lru, shape, gated | state, options)


def gates(dtype: mx.Dtype) -> dict[str, mx.array]:
    block = E // HEADS
    return {
        "input_weight": wave(HEADS, block, block, dtype=dtype),
        "input_bias": wave(HEADS, block, dtype=dtype),
        "recurrent_weight": wave(HEADS, block, block, dtype=dtype, frequency=2),
        "recurrent_bias": wave(HEADS, block, dtype=dtype, frequency=2),
        "recurrent_param": wave(E, dtype=dtype, frequency=4),
    }


def attention(H: int, Hkv: int, D: int, T: int, window: int, dtype: mx.Dtype) -> Iterator[Traffic]:
    q, k, v = (wave(1, heads, T, D, dtype=dtype) for heads in (H, Hkv, Hkv))
    shape = f"{H} / {Hkv} heads, {T} x {D}"
    arrays = {"q": q, "k": k, "v": v, "scale": D**-0.5, "window": window}
    for t in measure(metal.local_attention, shape, arrays, f"window {window}"):
        rows, group = t.threads // 32 * 8, H // Hkv  # a simdgroup of the kernel owns 8 rows
        keys = 0
        for first_row in range(0, T * group, rows):
            first = first_row // group
            last = min((first_row + rows - 1) // group, T - 1)
            keys += last + 1 - max(first - window + 1, 0)
        t.tiled = 2 * q.nbytes + 2 * Hkv * keys * D * dtype.size
        yield t


def attention_step(H: int, Hkv: int, D: int, window: int, dtype: mx.Dtype) -> list[Traffic]:
    arrays = {
        "q": wave(1, H, 1, D, dtype=dtype),
        "k_ring": wave(1, Hkv, window, D, dtype=dtype),
        "v_ring": wave(1, Hkv, window, D, dtype=dtype),
        "position": mx.array([window + 5]),
        "scale": D**-0.5,
        "window": window,
    }
    shape = f"{H} / {Hkv} heads, 1 x {D}"
    return measure(metal.local_attention_decode, shape, arrays, f"window {window}")


@dataclass
class Figures:
    ours: dict[tuple[str, str], Cost]
    """By phase and dtype."""
    theirs: dict[tuple[str, str], Cost]
    their_launches_per_token: int
    traffic: list[Traffic]
    our_scan: Cost
    their_scan: Cost

    @property
    def missed(self) -> list[str]:
        """Goals that the figures do not reach."""
        found = []
        for (phase, dtype), cost in self.ours.items():
            goal = GOALS[phase.split(",")[0]]
            if dtype != "4-bit" and cost.total > goal:
                found.append(f"{phase} in {dtype} takes {cost.total} launches, {goal} allowed")
        for t in self.traffic:
            if t.goal is not None and t.ratio > t.goal:
                found.append(f"{t.kernel} at {t.shape} moves {t.ratio:.2f} of what it must")
        return found


def collect() -> Figures:
    combinations = [(phase, dtype) for phase in PHASES for dtype in DTYPES]
    tokens = WINDOW
    later = their_layer(2 * CHUNK, True, mx.bfloat16, False).total
    here = their_layer(CHUNK, True, mx.bfloat16, False).total
    return Figures(
        ours={(p, d): our_layer(*PHASES[p], *DTYPES[d]) for p, d in combinations},
        theirs={(p, d): their_layer(*PHASES[p], *DTYPES[d]) for p, d in combinations},
        their_launches_per_token=(later - here) // CHUNK,
        traffic=list(collect_traffic()),
        our_scan=our_recurrence(tokens),
        their_scan=their_recurrence(tokens),
    )


def launches_table(figures: Figures) -> str:
    rows: list[Sequence[str]] = [("", "weights", "goal", "ours", "mlx-lm", "mlx-lm, T tokens")]
    for (phase, dtype), cost in figures.ours.items():
        other = figures.theirs[phase, dtype]
        goal = "" if dtype == "4-bit" else f"≤ {GOALS[phase.split(',')[0]]}"
        each = figures.their_launches_per_token
        formula = f"{other.total - each * CHUNK} + {each} T" if phase != "decode" else ""
        what = phase if phase == "decode" else f"{phase} of {CHUNK}"
        rows.append((what, dtype, goal, str(cost.total), str(other.total), formula))
    return markdown(rows, "ll>>>>")


def operations_table(figures: Figures) -> str:
    phases = ("decode", "prefill, later chunk")
    columns = [
        costs[phase, "bfloat16"] for phase in phases for costs in (figures.ours, figures.theirs)
    ]
    kernels = {path.stem for path in build.KERNELS.glob("*.metal")}
    names = sorted(
        {name for cost in columns for name in (*cost.launches, *cost.copies)},
        key=lambda name: (name not in kernels, name),
    )
    rows: list[Sequence[str]] = [
        ("", "decode, ours", "mlx-lm", f"prefill of {CHUNK}, ours", "mlx-lm")
    ]
    for name in names:
        shown = f"`{name}`" if name in kernels else name
        rows.append((shown, *(str(cost.launches[name] or "") for cost in columns)))
    rows.append(("copies into another layout", *(str(c.copies.total() or "") for c in columns)))
    rows.append(("**all**", *(f"**{cost.total}**" for cost in columns)))
    return markdown(rows, "l>>>>")


def rules_table() -> str:
    rows: list[Sequence[str]] = [("operation in the graph", "launches", "why")]
    rows += [(", ".join(rule.operations), str(rule.launches), rule.why) for rule in RULES]
    rows.append(("Concatenate", "n", CONCATENATE))
    return markdown(rows, "l>l")


def bytes_table(figures: Figures) -> str:
    head = ("kernel", "shape", "dtype", "with", "read", "written", "least", "ratio", "goal")
    rows: list[Sequence[str]] = [(*head, "read more than once", "groups x threads")]
    rows[0] = (*rows[0], "threadgroup memory", "barriers")
    for t in figures.traffic:
        again = ", ".join(f"{name} {times:.3g}x" for name, times in t.again.items())
        least = f"{t.least:,}" if t.tiled is None else f"{t.tiled:,} ({t.least:,})"
        rows.append(
            (
                *(f"`{t.kernel}`", t.shape, t.dtype, t.options),
                *(f"{sum(n.values()):,}" for n in (t.read, t.written)),
                *(least, f"{t.ratio:.2f}", f"≤ {t.goal}" if t.goal else "", again),
                *(f"{t.threadgroups} x {t.threads}", f"{t.threadgroup_bytes:,}", str(t.barriers)),
            )
        )
    return markdown(rows, "llll>>>>>l>>>")


def roofline_table(figures: Figures) -> str:
    head = ["GB/s"]
    columns: list[tuple[Cost, float]] = []
    for dtype in ("bfloat16", "4-bit"):
        head += [f"decode, {dtype}, ours µs", "mlx-lm µs"]
        columns += [(c["decode", dtype], 1e6) for c in (figures.ours, figures.theirs)]
    head += [f"recurrence of {WINDOW:,} tokens, ours ms", "mlx-lm ms"]
    columns += [(figures.our_scan, 1e3), (figures.their_scan, 1e3)]
    rows: list[Sequence[str]] = [head]
    for bandwidth, chip in CHIPS.items():
        times = [number(cost.seconds(bandwidth) * unit) for cost, unit in columns]
        rows.append((f"{bandwidth} ({chip})", *times))
    rows.append(("launches", *(f"{cost.total:,}" for cost, _ in columns)))
    rows.append(("MB", *(f"{number(cost.bytes.total() / 1e6)}" for cost, _ in columns)))
    return markdown(rows, "l>>>>>>")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: Sequence[Sequence[str]], alignment: str) -> str:
    rule = ["---:" if side == ">" else "---" for side in alignment]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def written(text: str, tables: dict[str, str]) -> str:
    """The document with every table between its markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- counts: {name} -->\n).*?(<!-- end of counts -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise RuntimeError(f"{TARGET} has no place for the table of {name}.")
        escaped = table.replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.DOTALL)
    return text


def pretend_apple_gpu() -> None:
    """Dispatch goes to the kernels. Nothing may be evaluated that is not on the Metal host."""
    metal_host.intercept()
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.Device(mx.gpu, 0)
    dispatch.set_backend("metal")
    # What makes a kernel differentiable launches nothing and cannot be traced.
    build.differentiable = lambda forward, backward: forward


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compare docs/kernels.md, write nothing"
    )
    parser.add_argument("--json", type=argparse.FileType("w"), help="also write the figures there")
    options = parser.parse_args()
    pretend_apple_gpu()
    figures = collect()
    tables = {
        "launches": launches_table(figures),
        "operations": operations_table(figures),
        "rules": rules_table(),
        "bytes": bytes_table(figures),
        "roofline": roofline_table(figures),
    }
    before = TARGET.read_text()
    after = written(before, tables)
    if options.json:
        json.dump(
            {
                "is_current": before == after,
                "launches": {
                    phase: {d: figures.ours[phase, d].total for d in DTYPES} for phase in PHASES
                },
                "ratios": [[t.kernel, t.shape, t.ratio, t.goal] for t in figures.traffic],
            },
            options.json,
        )
    for t in figures.traffic:
        print(f"{t.kernel} {t.shape} {t.dtype} {t.options}: reads {t.read}, writes {t.written}")
    for name in ("launches", "operations", "bytes", "roofline"):
        print(f"\n{tables[name]}")
    for goal in figures.missed:
        print(f"missed: {goal}", file=sys.stderr)
    if options.check and before != after:
        print(f"{TARGET} differs: run scripts/count_kernels.py", file=sys.stderr)
    elif before != after:
        TARGET.write_text(after)
    return 1 if figures.missed or (options.check and before != after) else 0


if __name__ == "__main__":
    sys.exit(main())
