"""Metal kernels from `kernels/*.metal`, made once and kept; only here is one made."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

KERNELS = Path(__file__).parent / "kernels"

Launch = Callable[..., list[mx.array]]


@cache
def kernel(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    *,
    header: str | None = None,
    ensure_row_contiguous: bool = True,
) -> Launch:
    """The kernel whose body is `kernels/<name>.metal`.

    Args:
        name: Of the file, and of the kernel in MLX's cache.
        inputs: Names of its input buffers, in the order of the call.
        outputs: Names of its output buffers.
        header: Name of a file of functions that come before the body.
        ensure_row_contiguous: Copy inputs that are not; false for bodies that follow strides.

    Returns:
        What `mx.fast.metal_kernel` returns. Apple's compiler sees the text when a first result is
        evaluated, not before.
    """
    made: Any = mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=(KERNELS / f"{name}.metal").read_text(),
        header=(KERNELS / header).read_text() if header else "",
        ensure_row_contiguous=ensure_row_contiguous,
    )
    launch: Launch = made
    return launch


@cache
def absent(dtype: mx.Dtype) -> mx.array:
    """Stands in for an input that a template parameter says is not there; never read."""
    return mx.array([0], dtype=dtype)


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[[Sequence[mx.array], Any], Sequence[mx.array]],
    arrays: Sequence[mx.array],
) -> Any:
    """forward(*arrays), with backward(arrays, cotangents) as its vector-Jacobian product.

    MLX knows no derivative of a kernel.
    """
    function = mx.custom_function(forward)

    @function.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        values = [primals] if isinstance(primals, mx.array) else list(primals)
        return tuple(backward(values, cotangents))

    return function(*arrays)
