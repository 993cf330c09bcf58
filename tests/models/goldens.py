"""Reads tests/golden/ and measures how far our ports are from the references recorded there.

Used by the tests and by scripts/parity.py, so that the table in docs is what the tests check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxmodels import registry

DIRECTORY = Path(__file__).parent.parent / "golden"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.safetensors"))
FAMILIES = ("gemma2", "gemma", "nemotron", "open_llama", "recurrent_gemma", "xglm")
CHUNKS = (1, 7, 16, 64)


@dataclass
class Case:
    """Arguments of one `forward` call and what the reference returned."""

    inputs: dict[str, mx.array]
    outputs: dict[str, mx.array]


class Golden:
    """A reference model's weights in our port, and what the reference computed with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.family = next(f for f in FAMILIES if name.startswith(f + "_"))
        self.config: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_text())
        loaded = mx.load(str(DIRECTORY / f"{name}.safetensors"), return_metadata=True)
        tensors: dict[str, mx.array] = loaded[0]  # type: ignore[assignment, index]
        self.metadata: dict[str, str] = loaded[1]  # type: ignore[assignment, index]
        self.task = self.metadata["task"]
        self.weights = _below(tensors, "weights.")
        self.reference_logits = tensors.get("reference_logits")
        cases: dict[str, Case] = {}
        for key, value in _below(tensors, "case.").items():
            case, side, field = key.split(".", 2)
            entry = cases.setdefault(case, Case({}, {}))
            (entry.inputs if side == "in" else entry.outputs)[field] = value
        self.cases = cases

    @cached_property
    def model(self) -> Any:
        """Our port with the reference's weights, in their dtype."""
        model_class, args_class = registry.model_classes(self.config)
        model = model_class(args_class.from_dict(self.config), self.task)  # type: ignore[attr-defined]
        model.load_weights(list(model.sanitize(self.weights).items()), strict=True)
        return model

    @property
    def tokens(self) -> mx.array:
        return self.cases["whole"].inputs["input_ids"]

    @property
    def logits(self) -> mx.array:
        return self.cases["whole"].outputs["logits"]

    @property
    def is_half(self) -> bool:
        return self.reference_logits is not None

    @property
    def can_continue(self) -> bool:
        """Whether reading in pieces must equal reading at once."""
        dynamic = "dynamic" in self.name  # its base depends on how much was read at once
        return self.task == "causal-lm" and not (
            dynamic or self.is_half or self.model.bidirectional
        )


def distance(got: mx.array, want: mx.array, where: mx.array | None = None) -> float:
    """Largest difference over the truth's standard deviation, or over its size if it is one number.

    Args:
        where: [B, T] positions to compare; the others mean nothing.
    """
    actual, truth = _float64(got), _float64(want)
    assert actual.shape == truth.shape, f"shape {actual.shape}, expected {truth.shape}"
    if where is not None:
        keep = np.array(where) != 0
        actual, truth = actual[keep], truth[keep]
    if not np.isfinite(actual).all():
        return float("inf")
    scale = truth.std() if truth.size > 1 else np.abs(truth).max()
    return float(np.abs(actual - truth).max() / scale)


def case_errors(golden: Golden, case: str) -> dict[str, float]:
    """Error of every recorded output of one `forward` call."""
    inputs, outputs = golden.cases[case].inputs, golden.cases[case].outputs
    result = golden.model.forward(
        **inputs,
        output_hidden_states=any(name.startswith("hidden_states") for name in outputs),
        output_attentions=any(name.startswith("attentions") for name in outputs),
    )
    mask = inputs.get("attention_mask")
    errors = {}
    for name, want in outputs.items():
        field, _, index = name.partition(".")
        got = getattr(result, field)
        if index:
            got = got[int(index)]
        has_time = mask is not None and want.shape[:2] == mask.shape
        errors[name] = distance(got, want, mask if has_time else None)
    for field in ("hidden_states", "attentions"):
        recorded = sum(name.startswith(field) for name in outputs)
        assert recorded in (0, len(getattr(result, field) or ())), f"{recorded} {field} recorded"
    return errors


def in_chunks(model: Any, tokens: mx.array, size: int) -> mx.array:
    """Logits of a prompt read in pieces, every piece continuing the states."""
    cache = model.make_cache()
    pieces = [model(tokens[:, i : i + size], cache=cache) for i in range(0, tokens.shape[1], size)]
    assert {state.offset for state in cache} == {tokens.shape[1]}
    return mx.concatenate(pieces, axis=1)


def conditions(golden: Golden) -> Iterator[tuple[str, float]]:
    """Every condition a float32 golden is compared under, with its worst error."""
    if golden.is_half:
        return
    for case in golden.cases:
        if case not in ("decode", "prefixes"):
            yield case, max(case_errors(golden, case).values())
    if golden.can_continue:
        for size in CHUNKS:
            yield (
                f"chunks of {size}",
                distance(in_chunks(golden.model, golden.tokens, size), golden.logits),
            )
    if "decode" in golden.cases:
        case_ = golden.cases["decode"]
        got = in_chunks(golden.model, case_.inputs["input_ids"], 1)
        yield "decode", distance(got, case_.outputs["logits"])


@dataclass
class HalfPrecision:
    """How a port and its reference round, both against the same weights run in float32."""

    ours: float
    """RMS error of our logits over their standard deviation."""
    reference: float
    """The same of the reference's own run in that dtype."""
    clear: int
    """Positions where the best logit leads by more than the reference's noise."""
    agreeing: int
    """Those of them where our best logit is the same."""


def half_precision(golden: Golden) -> HalfPrecision:
    """Compare a golden in float16 or bfloat16."""
    assert golden.reference_logits is not None
    truth = _float64(golden.logits)
    ours = _float64(golden.model(golden.tokens))
    reference = _float64(golden.reference_logits)
    best = truth.argmax(-1, keepdims=True)

    def lead(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.take_along_axis(logits, best, -1) - logits

    noise = np.abs(lead(reference) - lead(truth)).max()
    margin = np.partition(lead(truth), 1, axis=-1)[..., 1]
    clear = margin > noise
    return HalfPrecision(
        ours=_rms(ours - truth) / truth.std(),
        reference=_rms(reference - truth) / truth.std(),
        clear=int(clear.sum()),
        agreeing=int((clear & (ours.argmax(-1) == best[..., 0])).sum()),
    )


def _rms(x: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _below(tensors: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _float64(x: mx.array) -> npt.NDArray[np.float64]:
    return np.array(x.astype(mx.float32)).astype(np.float64)
