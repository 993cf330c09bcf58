"""Models on the hub that Gryphon could run."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from app.errors import GryphonError
from app.library.fit import Budget, Fit, fit_of_totals
from app.library.hub import Hub
from app.library.hub_errors import Interruption, RepositoryChanged, one_line
from app.library.installed import quantization
from mlxmodels import registry

# Bits of one value in a safetensors file; the hub counts values per dtype.
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# The hub cannot be asked for what we can run, so more are asked for than shown.
_ASKED = 5
_CONFIGS_AT_ONCE = 8


@dataclass(frozen=True)
class Found:
    """A repository that a search found."""

    name: str
    family: str
    parameters: int
    """About: what a packed value holds is told by config.json, which may name several widths."""
    weight_bytes: int
    quantization: str
    downloads: int
    gated: bool


def search(hub: Hub, query: str, limit: int) -> list[Found]:
    """Repositories whose name has the words of `query`, most downloaded first: those with
    safetensors, of a family that a port of ours or mlx-lm runs, and without code of their own.

    Raises:
        GryphonError: no network …
    """
    found = (_found(info) for info in hub.search(query, limit * _ASKED))
    return [one for one in found if one is not None][:limit]


def fits(hub: Hub, found: list[Found], budget: Budget) -> list[Fit | None]:
    """Whether each fits this machine, and with which context; None where its config.json cannot be
    read or does not say."""

    def one(found: Found) -> Fit | None:
        with contextlib.suppress(GryphonError, Interruption, RepositoryChanged):
            config = hub.config(found.name)
            if config.get("model_type") == found.family:
                return fit_of_totals(config, found.parameters, found.weight_bytes, budget)
        return None

    with ThreadPoolExecutor(_CONFIGS_AT_ONCE) as pool:
        try:
            return list(pool.map(one, found))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _found(info: Any) -> Found | None:
    config = info.config if isinstance(info.config, dict) else {}
    family = config.get("model_type")
    counts = _counts(info.safetensors.parameters) if info.safetensors else {}
    runnable = isinstance(family, str) and registry.supported(family) is not None
    if not runnable or not counts or config.get("auto_map"):
        return None
    return Found(
        name=one_line(str(info.id)),
        family=str(family),
        parameters=_parameters(config, counts),
        weight_bytes=sum(count * _BITS.get(dtype, 0) // 8 for dtype, count in counts.items()),
        quantization=_quantization(config, counts),
        downloads=info.downloads if isinstance(info.downloads, int) else 0,
        gated=bool(info.gated),
    )


def _parameters(config: dict[str, Any], counts: dict[str, int]) -> int:
    settings = config.get("quantization") or config.get("quantization_config")
    bits = settings.get("bits") if isinstance(settings, dict) else None
    per_value = 32 // bits if type(bits) is int and bits in (2, 3, 4, 5, 6, 8) else 8
    return sum(count * (per_value if dtype == "U32" else 1) for dtype, count in counts.items())


def _counts(parameters: Any) -> dict[str, int]:
    """Values per dtype, of what the hub says of them."""
    if not isinstance(parameters, dict):
        return {}
    return {k: n for k, n in parameters.items() if type(n) is int and 0 <= n < 2**53}


def _quantization(config: dict[str, Any], counts: dict[str, int]) -> str:
    if config.get("quantization") or config.get("quantization_config"):
        return one_line(quantization(config, dict))
    if "U32" in counts:  # the hub shortens config.json: MLX packs weights into these
        return "quantized"
    dtype = max(counts, key=lambda name: counts[name] * _BITS.get(name, 0))
    return _DTYPES.get(dtype, one_line(dtype))
