"""Which way an op is computed, decided here and nowhere else.

Every op has a reference in plain MLX and a Metal kernel. "auto" takes the kernel where MLX's
default device is an Apple GPU, the kernel can take the arguments, and it has passed its self-check.
Apple's compiler reports what it refuses only when an array is evaluated, far from here; so before a
process uses a variant of a kernel for the first time, the variant computes a small case, and if
that fails or differs from the reference, the op uses the reference for the rest of the process.
"""

import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import mlx.core as mx

from metal.build import listed

Backend = Literal["auto", "metal", "reference"]

_LOG = logging.getLogger(__name__)

# RMS of the difference over RMS of the reference, by the coarsest dtype of the arguments. Rounding
# is a tenth of it; a kernel that is wrong is wrong by more.
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 2e-2}


class Unsupported(ValueError):
    """Arguments that the reference takes and the kernel does not."""


@dataclass(frozen=True)
class Op:
    """One op and the two ways to compute it. `arguments` are those of the reference."""

    name: str
    reference: Callable[..., Any]
    """reference(*arguments), in plain MLX."""
    kernel: Callable[..., Any]
    """kernel(variant, *arguments), in Metal."""
    variant: Callable[..., Hashable]
    """variant(*arguments): what the kernel's text depends on; raises `Unsupported`."""
    sample: Callable[[Any], tuple[Any, ...]]
    """sample(variant): small arguments of that variant, for the self-check."""
    prefers_reference: Callable[..., bool] | None = None
    """prefers_reference(*arguments): whether "auto" leaves them to a kernel of MLX's own."""

    def __call__(self, backend: Backend, *arguments: Any) -> Any:
        """The op of the arguments.

        Raises:
            ValueError: the backend is not one, or is "metal" and the kernel cannot take them.
            RuntimeError: it is "metal" and there is no Apple GPU.
        """
        wanted = _default if backend == "auto" else backend
        if wanted == "reference":
            return self.reference(*arguments)
        if wanted == "metal":
            if not available():
                raise RuntimeError(
                    f"[{self.name}] backend 'metal' needs an Apple GPU as MLX's default device, "
                    f"got {mx.default_device()}; 'auto' runs on any device."
                )
            return self.kernel(self.variant(*arguments), *arguments)
        if wanted != "auto":
            raise ValueError(_no_backend(wanted))
        if not available() or self.name in _faults:
            return self.reference(*arguments)
        if self.prefers_reference is not None and self.prefers_reference(*arguments):
            return self.reference(*arguments)
        try:
            variant = self.variant(*arguments)
        except Unsupported:
            return self.reference(*arguments)
        if not self._is_trusted(variant):
            return self.reference(*arguments)
        return self.kernel(variant, *arguments)

    def check(self, variant: Hashable) -> str | None:
        """Compute the small case of a variant both ways; what is wrong with it, or None."""
        try:
            arguments = self.sample(variant)
            like = listed(self.reference(*arguments))
            # In 16 bits plain MLX rounds what a kernel keeps, scores for one, by more than a kernel
            # that is right may differ.
            want = listed(self.reference(*map(_widened, arguments)))
            got = listed(self.kernel(variant, *arguments))
            mx.eval(want, got)
            given = [a.dtype for a in arguments if isinstance(a, mx.array)]
            limit = max(_TOLERANCE[dtype] for dtype in given if dtype in _TOLERANCE)
            for g, w, expected in zip(got, want, like, strict=True):
                if fault := _difference(g, w, expected, limit):
                    return fault
        except Exception as error:  # whatever a compiler, a driver or a kernel may raise
            return f"{type(error).__name__}: {error}".strip()
        return None

    def _is_trusted(self, variant: Hashable) -> bool:
        key = (self.name, variant)
        if key not in _trusted:
            fault = self.check(variant)
            if fault is not None:
                _faults[self.name] = fault
                _LOG.warning(
                    "The Metal kernel of %s failed its self-check and is not used in this process; "
                    "answers stay right and get slower. %s (%s)",
                    *(self.name, fault, variant),
                )
                return False
            _trusted.add(key)
        return True


_default: Backend = "auto"
_trusted: set[tuple[str, Hashable]] = set()
_faults: dict[str, str] = {}


def available() -> bool:
    """Whether the default device is a GPU that runs Metal kernels."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def set_backend(backend: Backend) -> None:
    """What "auto" means from here on: "metal" or "reference" for every op, or its own choice again.

    Raises:
        ValueError: it is not a backend.
        RuntimeError: it is "metal" and there is no Apple GPU.
    """
    global _default
    if backend not in get_args(Backend):
        raise ValueError(_no_backend(backend))
    if backend == "metal" and not available():
        raise RuntimeError(
            f"[set_backend] 'metal' needs an Apple GPU as MLX's default device, "
            f"got {mx.default_device()}."
        )
    _default = backend


def faults() -> dict[str, str]:
    """Ops whose kernel failed its self-check in this process, and how."""
    return dict(_faults)


def forget() -> None:
    """Check every kernel again, as a new process would."""
    _trusted.clear()
    _faults.clear()


def _no_backend(name: object) -> str:
    return f"expected the backend 'auto', 'metal' or 'reference', got {name!r}."


def _widened(argument: Any) -> Any:
    is_narrow = isinstance(argument, mx.array) and argument.dtype in (mx.float16, mx.bfloat16)
    return argument.astype(mx.float32) if is_narrow else argument


def _difference(got: mx.array, want: mx.array, like: mx.array, limit: float) -> str | None:
    if got.shape != like.shape or got.dtype != like.dtype:
        return f"expected {like.shape} of {like.dtype}, got {got.shape} of {got.dtype}"
    truth = want.astype(mx.float32)
    error = mx.sqrt(mx.mean(mx.square(got.astype(mx.float32) - truth))).item()
    scale = mx.sqrt(mx.mean(mx.square(truth))).item()
    ratio = cast(float, error) / max(cast(float, scale), 1e-30)
    if math.isfinite(ratio) and ratio <= limit:
        return None
    return f"differs from the reference by {ratio:.1e} of its RMS"
