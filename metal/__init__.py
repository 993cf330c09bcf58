"""Array functions of the models: contracts, validation and dispatch. No models, no weights, no I/O.

The name shadows nothing in MLX: `mx.metal` is MLX's device module, bare `metal` is this package.
"""

from metal.linear_scan import causal_conv1d, linear_scan, rg_lru
from metal.local_attention import local_attention, local_attention_decode

__all__ = [
    "causal_conv1d",
    "linear_scan",
    "local_attention",
    "local_attention_decode",
    "rg_lru",
]
