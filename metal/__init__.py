"""Array functions of the models: contracts, validation and dispatch. No models, no weights, no I/O.

The name shadows nothing in MLX: `mx.metal` is MLX's device module, bare `metal` is this package.
"""

from metal.causal_conv1d import causal_conv1d
from metal.dispatch import Backend, available, faults, set_backend
from metal.linear_scan import block_rg_lru, linear_scan, rg_lru
from metal.local_attention import local_attention, local_attention_decode
from metal.rms_norm import rms_norm_1p

__all__ = [
    "Backend",
    "available",
    "block_rg_lru",
    "causal_conv1d",
    "faults",
    "linear_scan",
    "local_attention",
    "local_attention_decode",
    "rg_lru",
    "rms_norm_1p",
    "set_backend",
]
