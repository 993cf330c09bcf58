"""Fixes of published checkpoints that are the same for every family."""

import warnings

import mlx.core as mx

# Computed from the config; some versions of transformers saved them.
_BUFFERS = ("rotary_emb.inv_freq", "embed_positions.weights", "model.normalizer")


def without_buffers(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Without tensors that a model computes for itself."""
    return {name: value for name, value in weights.items() if not name.endswith(_BUFFERS)}


def drop_tied_head(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Without the head of a model whose embedding is its head; some files carry both."""
    head = weights.get("lm_head.weight")
    if head is None:
        return weights
    embedding = weights.get("model.embed_tokens.weight")
    if embedding is not None and not (
        head.shape == embedding.shape and mx.array_equal(head, embedding).item()
    ):
        warnings.warn(
            "lm_head.weight differs from the embedding it is tied to and is ignored", stacklevel=2
        )
    return {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
