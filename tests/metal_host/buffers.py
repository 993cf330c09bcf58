"""MLX arrays as bytes in memory, the way a kernel gets them, and back."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # its bits
    mx.float32: np.float32,
}


@dataclass
class Buffer:
    name: str
    data: Bytes
    element: int  # bytes of one element
    dtype: mx.Dtype
    residue: int = 0  # of the address, modulo 16
    is_output: bool = False
    initialised: bool = True
    present: Bytes | None = None  # which bytes belong to a view with gaps
    strides: tuple[int, ...] = ()  # in elements

    def place(self, byte: int) -> str:
        """A byte's element, for a message."""
        if self.element == 0:
            return f"{self.name} byte {byte}"
        return f"{self.name}[{byte // self.element}] of {self.data.size // self.element}"


def input_buffer(name: str, array: mx.array, *, contiguous: bool) -> Buffer:
    """An input; MLX copies one that is not row-contiguous first, if the kernel asks for that."""
    numpy = _numpy_view(array)
    if contiguous and not numpy.flags.c_contiguous:
        numpy = np.ascontiguousarray(numpy)
        residue = 0
    else:
        residue = (numpy.ctypes.data - _allocation_residue()) % 16
    element = numpy.itemsize
    strides = tuple(stride // element for stride in numpy.strides)
    if any(stride < 0 for stride in strides):
        raise NotImplementedError(f"[metal_host] input {name} has a negative stride.")
    data, present = _span(numpy)
    return Buffer(name, data, element, array.dtype, residue, present=present, strides=strides)


def output_buffer(
    name: str, shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None
) -> Buffer:
    kind = np.dtype(_NUMPY[dtype])
    if init_value is None:
        data = np.full(int(np.prod(shape)) * kind.itemsize, 0xFF, np.uint8)
    else:
        data = _numpy_view(mx.full(shape, init_value, dtype)).reshape(-1).view(np.uint8).copy()
    return Buffer(
        name, data, kind.itemsize, dtype, is_output=True, initialised=init_value is not None
    )


def metadata_buffers(name: str, array: mx.array, strides: tuple[int, ...]) -> dict[str, Buffer]:
    """What a kernel that mentions x_shape, x_strides or x_ndim gets with x."""
    shape = np.array(array.shape, np.int32)
    return {
        f"{name}_shape": Buffer(f"{name}_shape", shape.view(np.uint8), 4, mx.int32),
        f"{name}_strides": Buffer(
            f"{name}_strides", np.array(strides, np.int64).view(np.uint8), 8, mx.int64
        ),
        f"{name}_ndim": Buffer(
            f"{name}_ndim", np.array([array.ndim], np.int32).view(np.uint8), 4, mx.int32
        ),
    }


def to_mlx(buffer: Buffer, shape: tuple[int, ...]) -> mx.array:
    values: npt.NDArray[np.generic] = buffer.data.view(_NUMPY[buffer.dtype]).reshape(shape)
    array = mx.array(values)
    return array.view(mx.bfloat16) if buffer.dtype == mx.bfloat16 else array


def _numpy_view(array: mx.array) -> npt.NDArray[np.generic]:
    if array.dtype not in _NUMPY:
        raise NotImplementedError(f"[metal_host] {array.dtype} is not supported.")
    mx.eval(array)
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _allocation_residue() -> int:
    """Where MLX's own allocations begin on this machine, modulo 16 (on a GPU they begin at 0)."""
    fresh = mx.zeros((64,), mx.float32)
    mx.eval(fresh)
    return int(np.asarray(fresh).ctypes.data) % 16


def _span(numpy: npt.NDArray[np.generic]) -> tuple[Bytes, Bytes | None]:
    """All bytes from the first element to the last, and which of them are elements."""
    if numpy.flags.c_contiguous:
        return numpy.reshape(-1).view(np.uint8).copy(), None
    element = numpy.itemsize
    last = sum((n - 1) * stride for n, stride in zip(numpy.shape, numpy.strides, strict=True))
    bits = np.dtype(f"u{element}")
    elements = np.zeros(last // element + 1, bits)
    inside = np.zeros(elements.size, bits)
    for whole, value in ((elements, numpy.view(bits)), (inside, bits.type(2 ** (8 * element) - 1))):
        window = np.lib.stride_tricks.as_strided(whole, numpy.shape, numpy.strides)
        window[...] = value
    return elements.view(np.uint8), inside.view(np.uint8)
