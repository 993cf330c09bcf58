"""Speed of the array functions in `metal`: the Metal kernels on a Mac, plain MLX elsewhere.

    .venv/bin/python scripts/bench_kernels.py            # everything, a few minutes
    .venv/bin/python scripts/bench_kernels.py --op linear_scan --pairs 20 --no-csv

On an Apple GPU every kernel takes turns with its reference in plain MLX, at the shapes of
RecurrentGemma 2B and Gemma 2. Elsewhere the reference is what runs, and it takes turns with what
one would write instead: mlx-lm's loop over the tokens, attention with the whole score matrix.

A ratio is the other's time over ours, the median of the pairs'. GB/s counts each input read once
and each output written once; for attention that is the least there is to move, not what moves.
Nothing is timed unless both agree. Appends to results/<machine>-kernels.csv; the status is 1 where
both differ or a ratio misses its goal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from measurement import append_csv, machine, results_file, take_turns  # isort: skip  (BLAS first)

import mlx.core as mx

import metal

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
AGREEMENT = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}


@dataclass
class Case:
    """One op at one shape, and what it is held against."""

    op: str
    shape: str
    dtype: mx.Dtype
    ours: Callable[[], Any]
    other: Callable[[], Any]
    other_name: str
    least_bytes: int
    """Of all inputs and outputs, once."""
    goal: float | None = None


@dataclass
class Row:
    op: str
    shape: str
    dtype: str
    other: str
    ours_ms: float
    other_ms: float
    ratio: float
    least: float
    greatest: float
    gigabytes_per_s: float
    peak_mb: float
    """Of memory above the inputs, ours."""
    other_peak_mb: float
    goal: float | None

    @property
    def is_missed(self) -> bool:
        return self.goal is not None and self.ratio < self.goal


def normal(*shape: int, dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    value = (mx.random.normal(shape) * scale).astype(dtype)
    mx.eval(value)
    return value


def both_ways(
    op: str,
    shape: str,
    dtype: mx.Dtype,
    function: Callable[..., Any],
    inputs: tuple[mx.array, ...],
    **keywords: Any,
) -> Case:
    """The kernel against the reference."""
    outputs = function(*inputs, **keywords, backend="reference")
    outputs = [outputs] if isinstance(outputs, mx.array) else list(outputs)
    moved = sum(array.nbytes for array in (*inputs, *outputs))
    return Case(
        *(op, shape, dtype),
        lambda: function(*inputs, **keywords, backend="metal"),
        lambda: function(*inputs, **keywords, backend="reference"),
        "reference",
        moved,
    )


def kernel_cases(dtype: mx.Dtype) -> Iterator[Case]:
    """Where the models use them: RecurrentGemma 2B's widths, Gemma 2's softcap."""
    E, heads = 2560, 10
    D = E // heads
    weights = [normal(*s, dtype=dtype, scale=0.06) for s in ((heads, D, D), (heads, D)) * 2]
    param = normal(E, dtype=dtype)
    taps, bias = normal(E, 4, dtype=dtype), normal(E, dtype=dtype)
    for B, T in ((1, 1), (8, 1), (1, 512), (1, 2048)):
        shape = f"B{B} T{T} E{E}"
        x, gi, gr = (normal(B, T, E, dtype=dtype) for _ in range(3))
        a = mx.sigmoid(gr * 3 + 3)
        h0 = normal(B, E, dtype=mx.float32)
        yield both_ways("linear_scan", shape, dtype, metal.linear_scan, (x, a, h0))
        yield both_ways("rg_lru", shape, dtype, metal.rg_lru, (x, gi, gr, param, h0))
        inputs = (x, *weights, param, h0)
        yield both_ways("block_rg_lru", shape, dtype, metal.block_rg_lru, inputs)
        state = normal(B, 3, E, dtype=dtype)
        yield both_ways("causal_conv1d", shape, dtype, metal.causal_conv1d, (x, taps, bias, state))
        yield both_ways("rms_norm_1p", shape, dtype, metal.rms_norm_1p, (x, bias), eps=1e-6)
    for softcap in (None, 50.0):
        capped = "" if softcap is None else f" cap {softcap:g}"
        for H, Hkv, T in ((10, 1, 2048), (10, 1, 8192), (8, 4, 8192)):
            q = normal(1, H, T, D, dtype=dtype)
            k, v = (normal(1, Hkv, T, D, dtype=dtype) for _ in range(2))
            window = 2048 if Hkv == 1 else 4096
            yield both_ways(
                *("local_attention", f"H{H}/{Hkv} T{T} W{window} D{D}{capped}", dtype),
                metal.local_attention,
                (q, k, v),
                **{"scale": D**-0.5, "window": window, "softcap": softcap},
            )
        for H, Hkv, window in ((10, 1, 2048), (8, 4, 4096)):
            q = normal(1, H, 1, D, dtype=dtype)
            k, v = (normal(1, Hkv, window, D, dtype=dtype) for _ in range(2))
            yield both_ways(
                *("local_attention_decode", f"H{H}/{Hkv} W{window} D{D}{capped}", dtype),
                metal.local_attention_decode,
                (q, k, v),
                position=mx.array([3 * window]),
                **{"scale": D**-0.5, "window": window, "softcap": softcap},
            )


def reference_cases(dtype: mx.Dtype) -> Iterator[Case]:
    """What runs off Apple GPUs against mlx-lm's way and the obvious one."""
    from mlx_lm.models.recurrent_gemma import rnn_scan

    for T, E, goal in ((512, 256, 8.0), (512, 1024, None), (512, 2560, None), (2048, 2560, 1.3)):
        x = normal(1, T, E, dtype=dtype)
        a = mx.random.uniform(0.0, 1.0, (1, T, E)).astype(dtype) ** 0.2
        h0 = normal(1, E, dtype=mx.float32)
        mx.eval(a)
        yield Case(
            *("linear_scan", f"B1 T{T} E{E}", dtype),
            lambda x=x, a=a, h0=h0: metal.linear_scan(x, a, h0),  # type: ignore[misc]
            lambda x=x, a=a, h0=h0: rnn_scan(x, a, h0.astype(x.dtype)),  # type: ignore[misc]
            "mlx-lm's loop",
            *(3 * x.nbytes + 2 * h0.nbytes, goal),
        )
    H, T, W, D = 4, 8192, 2048, 64
    q = normal(1, H, T, D, dtype=dtype)
    k, v = (normal(1, 1, T, D, dtype=dtype) for _ in range(2))
    steps = mx.arange(T)
    for softcap in (None, 50.0):

        def whole(softcap: float | None = softcap) -> mx.array:
            distance = steps[:, None] - steps
            mask = (distance >= 0) & (distance < W)
            if softcap is None:
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask=mask)
            scores = mx.tanh((q * D**-0.5) @ k.swapaxes(-1, -2) / softcap) * softcap
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
            return mx.softmax(scores, axis=-1, precise=True) @ v

        def windowed(softcap: float | None = softcap) -> mx.array:
            return metal.local_attention(q, k, v, scale=D**-0.5, window=W, softcap=softcap)

        yield Case(
            *("local_attention", f"H{H}/1 T{T} W{W} D{D} cap {softcap}", dtype),
            *(windowed, whole, "masked full matrix"),
            2 * q.nbytes + 2 * k.nbytes,
            3.0,
        )


def disagreement(case: Case) -> str | None:
    got, want = case.ours(), case.other()
    got, want = (list(v) if isinstance(v, (tuple, list)) else [v] for v in (got, want))
    for ours, other in zip(got, want, strict=True):
        truth = other.astype(mx.float32)
        error = mx.sqrt(mx.mean(mx.square(ours.astype(mx.float32) - truth)))
        ratio = (error / mx.sqrt(mx.mean(mx.square(truth)))).item()
        if not ratio <= AGREEMENT[case.dtype]:
            return (
                f"{case.op} {case.shape} {name_of(case.dtype)}: differs by {ratio:.1e} of its RMS"
            )
    return None


def peak_mb(run: Callable[[], Any]) -> float:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return (mx.get_peak_memory() - before) / 1e6


def measure(case: Case, pairs: int) -> Row:
    turns = take_turns(case.ours, case.other, pairs)
    return Row(
        *(case.op, case.shape, name_of(case.dtype), case.other_name),
        **asdict(turns),
        gigabytes_per_s=case.least_bytes / turns.ours_ms / 1e6,
        peak_mb=peak_mb(case.ours),
        other_peak_mb=peak_mb(case.other),
        goal=case.goal,
    )


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def main() -> None:
    on_gpu = metal.available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--op", action="append", help="only this one; default: all")
    parser.add_argument("--pairs", type=int, default=10)
    default = ["bfloat16", "float16", "float32"] if on_gpu else ["float32"]
    parser.add_argument("--dtype", choices=DTYPES, action="append", help=f"default: {default}")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    arguments = parser.parse_args()
    host = machine()
    print(", ".join(f"{key} {value}" for key, value in host.items()))
    print(f"{'op':<23} {'shape':<32} {'dtype':<9} {'ours ms':>9} {'other ms':>9}  ratio", end="")
    print("  (least, greatest)    GB/s  peak MB  other's  against")
    path = results_file("-kernels")
    rows: list[Row] = []
    faults: list[str] = []
    for name in arguments.dtype or default:
        mx.random.seed(0)
        for case in (kernel_cases if on_gpu else reference_cases)(DTYPES[name]):
            if arguments.op and case.op not in arguments.op:
                continue
            try:
                fault = disagreement(case)
                row = None if fault else measure(case, arguments.pairs)
            except Exception as error:  # what Apple's compiler refuses comes out of an evaluation
                fault = f"{case.op} {case.shape} {name}: {type(error).__name__}: {error}"
                row = None
            if row is None:
                faults.append(str(fault))
                print(fault, file=sys.stderr, flush=True)
                continue
            rows.append(row)
            if not arguments.no_csv:
                append_csv(path, [host | {"pairs": arguments.pairs} | asdict(row)])
            print(
                f"{row.op:<23} {row.shape:<32} {row.dtype:<9} {row.ours_ms:9.3f} "
                f"{row.other_ms:9.3f} {row.ratio:6.2f}  ({row.least:.2f}, {row.greatest:.2f}) "
                f"{row.gigabytes_per_s:12.1f} {row.peak_mb:8.1f} {row.other_peak_mb:8.1f}  "
                f"{row.other}{f', goal {row.goal:g}' if row.goal else ''}"
                f"{' MISSED' if row.is_missed else ''}",
                flush=True,
            )
            mx.clear_cache()
    if rows and not arguments.no_csv:
        print(f"added to {path}")
    if faults or any(row.is_missed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
