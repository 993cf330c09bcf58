"""Metal kernels from `kernels/*.metal`, made once and kept; only here is one made."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

KERNELS = Path(__file__).parent / "kernels"

# MLX gives Metal an input of fewer elements in another address space, which makes another text.
FEW_ELEMENTS = 8

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
def _absent(dtype: mx.Dtype) -> mx.array:
    return mx.array([0], dtype=dtype)


def optional(value: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """An optional input; where there is none, what a template parameter keeps from being read."""
    return _absent(dtype) if value is None else value.astype(dtype)


Arguments = Sequence[mx.array | None]


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[[Arguments, list[mx.array]], Arguments],
) -> Callable[..., Any]:
    """forward with a derivative, which MLX does not know of a kernel. To be kept: it costs a call.

    Args:
        forward: Of arrays; None stands for an optional one that is not given.
        backward: backward(arguments, cotangents), the vector-Jacobian product; None for arguments
            that have none.
    """
    made: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def call(*arguments: mx.array | None) -> Any:
        given = tuple(argument is not None for argument in arguments)
        if given not in made:
            made[given] = _with_vjp(forward, backward, given)
        return made[given](*[argument for argument in arguments if argument is not None])

    return call


def _with_vjp(
    forward: Callable[..., Any],
    backward: Callable[[Arguments, list[mx.array]], Arguments],
    given: tuple[bool, ...],
) -> Callable[..., Any]:
    def filled(arrays: Sequence[mx.array]) -> list[mx.array | None]:
        waiting = iter(arrays)
        return [next(waiting) if is_given else None for is_given in given]

    @mx.custom_function
    def function(*arrays: mx.array) -> Any:
        return forward(*filled(arrays))

    @function.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        arguments = filled(listed(primals))
        gradients = backward(arguments, listed(cotangents))
        return tuple(
            mx.zeros_like(argument) if gradient is None else gradient
            for argument, gradient in zip(arguments, gradients, strict=True)
            if argument is not None
        )

    made: Callable[..., Any] = function
    return made


def gradients_of(
    function: Callable[..., Any], arguments: Arguments, cotangents: list[mx.array]
) -> list[mx.array | None]:
    """Vector-Jacobian product of what MLX can differentiate; None for arguments without one."""
    floating = {
        i: argument
        for i, argument in enumerate(arguments)
        if argument is not None and mx.issubdtype(argument.dtype, mx.floating)
    }

    def of_floating(*values: mx.array) -> list[mx.array]:
        filled = list(arguments)
        for i, value in zip(floating, values, strict=True):
            filled[i] = value
        return listed(function(*filled))

    _, products = mx.vjp(of_floating, list(floating.values()), cotangents)
    gradients: list[mx.array | None] = [None] * len(arguments)
    for i, product in zip(floating, products, strict=True):
        gradients[i] = product
    return gradients


def listed(values: Any) -> list[mx.array]:
    """What MLX gives for one array or several, as a list."""
    return [values] if isinstance(values, mx.array) else list(values)
