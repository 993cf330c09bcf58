"""Which way `metal`'s ops are computed in the engine, and what a person should know about it."""

from __future__ import annotations

import metal
from app.errors import GryphonError
from app.settings import Settings

# A compiler's message is long; the engine log has all of it.
_FAULT_LENGTH = 100


def choose_backend() -> str:
    """Apply GRYPHON_KERNELS to this process.

    Returns:
        The choice in words, empty when it is left to the dispatch.

    Raises:
        GryphonError: "no_apple_gpu", or "invalid_setting".
    """
    kernels = Settings.from_environment().kernels
    try:
        metal.set_backend(kernels)
    except RuntimeError as error:
        raise GryphonError(
            "no_apple_gpu",
            "GRYPHON_KERNELS=metal needs an Apple GPU, and this machine has none that MLX can use. "
            "Unset it: kernels run wherever they can by themselves.",
        ) from error
    return "" if kernels == "auto" else f"GRYPHON_KERNELS={kernels}"


def faults() -> list[str]:
    """A phrase for each op whose kernel failed its self-check; empty as a rule."""
    return [
        f"kernel of {op} off: {' '.join(fault.split())[:_FAULT_LENGTH]}"
        for op, fault in metal.faults().items()
    ]
