"""The request for embeddings: what is asked, what comes back, and what is refused.

No MLX here, nor anything that imports it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from app.engine.request_checks import MAX_INT32, check_client, check_keep_alive, check_model
from app.engine.requests import ModelRef
from app.errors import GryphonError

# What OpenAI's API takes in one request.
MAX_INPUTS = 2048
MAX_TOKENS = 1024 * 1024
MAX_VECTOR_BYTES = 32 * 1024 * 1024

Pooling = Literal["mean", "last"]


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Ask for one vector per input. Exactly one of `texts` and `tokens` is set.

    Ends in an `Embedded` and a `Finished`, or in `Failed`.
    """

    id: str
    model: ModelRef
    texts: list[str] | None = None
    """Tokenized with whatever the model's tokenizer puts around a sequence."""
    tokens: list[list[int]] | None = None
    """Token ids, used as they are."""
    pooling: Pooling = "mean"
    """Of the hidden states after the final norm: the mean over all tokens, or the last one's."""
    client: str = ""
    """As in `GenerationRequest`, as are the following."""
    wait_for_model: bool = True
    keep_alive_s: float | None = None


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """The vectors of all inputs, in their order; a `Finished` follows."""

    id: str
    vectors: bytes
    """Little-endian float32, `dimensions` of each input, of length 1 (L2)."""
    dimensions: int
    prompt_tokens: list[int]
    """Of each input."""


def check_embed(request: Embed) -> None:
    """Refuse what no model could embed.

    Raises:
        GryphonError: "invalid_request", naming the field, what it may be and what it is.
    """
    if (request.texts is None) == (request.tokens is None):
        raise GryphonError("invalid_request", "Give exactly one of texts and tokens.")
    count = len(request.texts if request.texts is not None else request.tokens or [])
    if not 1 <= count <= MAX_INPUTS:
        raise GryphonError(
            "invalid_request", f"There may be 1 to {MAX_INPUTS} inputs at once, got {count}."
        )
    for index, tokens in enumerate(request.tokens or []):
        if not tokens:
            raise GryphonError("invalid_request", f"Input {index} is empty: it holds no token.")
        if not 0 <= min(tokens) <= max(tokens) <= MAX_INT32:
            raise GryphonError(
                "invalid_request",
                f"Token ids must be 0 to {MAX_INT32}, input {index} has {min(tokens)} to "
                f"{max(tokens)}.",
            )
    check_model(request.model)
    check_client(request.client)
    check_keep_alive(request.keep_alive_s)
