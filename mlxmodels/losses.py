"""Losses of the tasks, in float32, as transformers 5.23 `loss/loss_utils.py` defines them.

Where no label counts the loss is 0, and so is its gradient; there it is NaN. Labels are checked,
which waits for them: these functions cannot be part of a compiled one.
"""

import mlx.core as mx
import mlx.nn as nn

IGNORED = -100
"""Label of a token that does not count."""


def next_token(logits: mx.array, labels: mx.array) -> mx.array:
    """Cross entropy of logits [B, T, V] at t with labels [B, T] at t + 1."""
    _check_shape(logits, labels)
    if labels.shape[1] == 1:
        return mx.array(0.0)
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def cross_entropy(logits: mx.array, labels: mx.array, ignored: int = IGNORED) -> mx.array:
    """Mean over the labels [...] that count, of logits [..., V]; 0 if none does.

    Raises:
        ValueError: the labels' shape does not fit, or one is no class.
    """
    _check_shape(logits, labels)
    labels = labels.astype(mx.int64)
    counts = labels != ignored
    classes = logits.shape[-1]
    known = mx.where(counts, labels, 0)
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= classes:  # MLX would read foreign memory
        raise ValueError(
            f"[forward] expected labels from 0 to {classes - 1} or {ignored}, got {low} to {high}."
        )
    each = nn.losses.cross_entropy(logits.astype(mx.float32), known, reduction="none")
    return mx.where(counts, each, 0.0).sum() / mx.maximum(counts.sum(), 1)


def sequence(logits: mx.array, labels: mx.array, problem_type: str | None) -> mx.array:
    """Loss of one prediction [B, L] per row.

    Args:
        labels: [B] integers for single-label classification; [B, L] floats for multi-label
            classification; [B] or [B, L] floats for regression.
        problem_type: "regression", "single_label_classification", "multi_label_classification";
            None decides by the number of labels and the labels' dtype.

    Raises:
        ValueError: the labels' shape does not fit.
    """
    B, L = logits.shape
    if problem_type is None and L == 1:
        problem_type = "regression"
    elif problem_type is None and mx.issubdtype(labels.dtype, mx.integer):
        problem_type = "single_label_classification"
    expected: tuple[tuple[int, ...], ...] = ((B, L),)
    if problem_type == "single_label_classification":
        expected = ((B,),)
    elif problem_type == "regression" and L == 1:
        expected = ((B,), (B, 1))
    if labels.shape not in expected:
        shapes = " or ".join(map(str, expected))
        raise ValueError(f"[forward] expected labels {shapes}, got {labels.shape}.")
    logits = logits.astype(mx.float32)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    labels = labels.astype(mx.float32).reshape(B, L)
    if problem_type == "regression":
        return mx.square(logits - labels).mean()
    return nn.losses.binary_cross_entropy(logits, labels, with_logits=True, reduction="mean")


def span(start_logits: mx.array, end_logits: mx.array, start: mx.array, end: mx.array) -> mx.array:
    """Mean of the cross entropies of start and end [B] over T positions, [B, T] logits each.

    A negative position counts as 0, one past the end does not count.
    """
    T = start_logits.shape[1]

    def one(logits: mx.array, positions: mx.array) -> mx.array:
        return cross_entropy(logits, mx.clip(positions.reshape(-1), 0, T), ignored=T)

    return (one(start_logits, start) + one(end_logits, end)) / 2


def _check_shape(logits: mx.array, labels: mx.array) -> None:
    if labels.shape != logits.shape[:-1] or not mx.issubdtype(labels.dtype, mx.integer):
        raise ValueError(
            f"[forward] expected labels {logits.shape[:-1]} integer, "
            f"got {labels.shape} of {labels.dtype}."
        )
