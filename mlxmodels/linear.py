"""MLX's linear layers with a decode step that is bound by reading the weight, on a CPU too.

MLX hands every float32 product to cblas_sgemm, and OpenBLAS copies the weight into another order
before it multiplies: for a single row that takes longer than the product. Products of up to 10^6
multiplications go to kernels without the copy where it has them (x86-64 with AVX-512), so the
weight is multiplied in blocks of rows, as one batch. Ratios of time, one core: 2.7 for a row and
1024 x 1024, 3.0 for 3072 x 1024, 1.8 for 2048 x 576; 1.2 to 4 for eight rows.
"""

import mlx.core as mx
import mlx.nn as nn

_FEW_ROWS = 8
_PACKED = 1_000_000
"""Multiplications from which OpenBLAS packs."""
_BLOCK = 1 << 19
"""Multiplications of one block."""


class Linear(nn.Linear):
    """`mlx.nn.Linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _would_pack(x, self.weight):
            out: mx.array = super().__call__(x)
            return out
        out = _in_blocks(x, self.weight)
        return out + self.bias if "bias" in self else out


class Embedding(nn.Embedding):
    """`mlx.nn.Embedding`."""

    def as_linear(self, x: mx.array) -> mx.array:
        if _would_pack(x, self.weight):
            return _in_blocks(x, self.weight)
        out: mx.array = super().as_linear(x)
        return out


def _would_pack(x: mx.array, weight: mx.array) -> bool:
    rows = x.size // x.shape[-1]
    if rows > _FEW_ROWS or rows * weight.size <= _PACKED or x.dtype != mx.float32:
        return False
    return mx.default_device().type == mx.DeviceType.cpu


def _in_blocks(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., K] times the transpose of weight [N, K]."""
    N, K = weight.shape
    flat = x.reshape(-1, K)
    block = max(1, _BLOCK // flat.size)
    whole = N // block * block
    blocks = weight[:whole].reshape(-1, block, K).swapaxes(1, 2)
    out = (flat @ blocks).swapaxes(0, 1).reshape(-1, whole)
    if whole < N:
        out = mx.concatenate([out, flat @ weight[whole:].T], axis=-1)
    return out.reshape(*x.shape[:-1], N)
