"""Fixes of published checkpoints that are the same for every family."""

import mlx.core as mx

from mlxmodels.errors import ModelError

# Computed from the config; some versions of transformers saved them.
_BUFFERS = ("rotary_emb.inv_freq", "embed_positions.weights", "model.normalizer")


def without_buffers(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Without tensors that a model computes for itself."""
    return {name: value for name, value in weights.items() if not name.endswith(_BUFFERS)}


def drop_tied_head(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Without the head of a model whose embedding is its head; some files carry both.

    Raises:
        ModelError: they differ. transformers 5.23 would not tie them then, earlier ones would.
    """
    head = weights.get("lm_head.weight")
    if head is None:
        return weights
    embedding = weights.get("model.embed_tokens.weight")
    if embedding is not None and not (
        head.shape == embedding.shape and mx.array_equal(head, embedding).item()
    ):
        raise ModelError(
            "the checkpoint holds an lm_head.weight that differs from the embedding, and its "
            "config.json ties the two; set tie_word_embeddings to false there to use the head, or "
            "remove it."
        )
    return {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
