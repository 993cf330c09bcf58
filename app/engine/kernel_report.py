"""`python -m app.engine.kernel_report [FIRST]`: every kernel against its reference, as JSON lines.

What is about to run is said before it runs: a kernel may take the process down with it. FIRST is
the case to begin with, after one that did.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from app.engine import blas

_ROUNDS = 5
_ENOUGH_S = 0.5
# A round lasts about as long, in as many calls as that takes: a single short one is mostly waiting.
_ROUND_S = 0.01
_MOST_CALLS = 20


def report(first: int = 0) -> Iterator[dict[str, object]]:
    """What this machine is; then of each case its name, every variant before it is checked, faults
    as they are found, and how long a call takes. Without an Apple GPU only the references run."""
    blas.preload()
    import mlx.core as mx

    import metal
    from metal import self_check

    has_kernels = metal.available()
    # As the engine holds weights: on a CPU 16-bit products are slow.
    name = "bfloat16" if has_kernels else "float32"
    yield {
        "device": "Apple GPU" if has_kernels else mx.default_device().type.name.upper(),
        "device_name": mx.device_info()["device_name"],
        "dtype": name,
        "has_kernels": has_kernels,
        "cases": len(self_check.CASES),
    }
    for case in self_check.CASES[first:]:
        op = case.op
        yield {"op": op.name, "size": case.size}
        arguments = case.arguments(self_check.DTYPES[name])
        mx.eval([array for array in arguments if isinstance(array, mx.array)])
        kernel_ms = None
        if has_kernels:
            for words, variant in case.variants():
                yield {"variant": words}
                if fault := op.check(variant):
                    yield {"fault": fault}
            yield {"variant": f"{name} at full size"}
            if fault := case.check_at_size(arguments):
                yield {"fault": fault}
            else:
                kernel_ms = _milliseconds(op.kernel, op.variant(*arguments), *arguments)
        yield {"kernel_ms": kernel_ms, "reference_ms": _milliseconds(op.reference, *arguments)}
        mx.clear_cache()


def _milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of one call, the median of a few rounds, fewer of long ones."""
    import mlx.core as mx

    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        mx.eval([function(*arguments) for _ in range(calls)])
        return (time.perf_counter() - begin) / calls

    once = seconds(1)
    if once < _ENOUGH_S:  # or most of it may have been compiling
        once = seconds(1)
    calls = max(1, min(_MOST_CALLS, round(_ROUND_S / once)))
    rounds: list[float] = []
    while len(rounds) < _ROUNDS and calls * sum(rounds) < _ENOUGH_S:
        rounds.append(seconds(calls))
    return 1000 * statistics.median(rounds)


if __name__ == "__main__":
    for line in report(*map(int, sys.argv[1:])):
        print(json.dumps(line), flush=True)
