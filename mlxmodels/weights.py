"""Fixes of published checkpoints that are the same for every family."""

import warnings

import mlx.core as mx


def with_model_prefix(weights: dict[str, mx.array], probe: str) -> dict[str, mx.array]:
    """A bare-model file, recognised by its unprefixed `probe` tensor, under `model.` names."""
    if probe not in weights:
        return dict(weights)
    return {
        name if name.startswith("lm_head.") else f"model.{name}": value
        for name, value in weights.items()
    }


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
