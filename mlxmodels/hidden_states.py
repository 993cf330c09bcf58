"""Final hidden states of a model: what its decoder gives its head, after the last norm.

Ports of ours say where they are. Models of mlx-lm's zoo do not; what looks like their decoder is
tried on a few tokens and taken only if the model's own head makes the model's logits of it, up to
scaling and capping.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmodels import heads
from mlxmodels.errors import ModelError
from mlxmodels.loading import LoadedModel

_DECODERS = ("model", "transformer", "backbone")
_EMBEDDINGS = (
    *("embed_tokens", "wte", "embeddings", "token_embeddings", "tok_embeddings"),
    *("word_embeddings", "embedding"),
)
_TOKENS = [[1, 2, 3], [4, 5]]
# Of the range of the values compared: above what 16-bit and quantized weights round.
_TOLERANCE = 0.05


class HiddenStates:
    """Computes them for a loaded model.

    Attributes:
        size: Numbers of each token.
        can_batch: Whether padding after shorter rows leaves the others as they are alone.

    Raises:
        ModelError: where the model keeps them is not known.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        model = loaded.model
        if isinstance(model, heads.TaskModel):
            self._decoder: Any = model.model
            self.size = int(model.args.hidden_size)
            self.can_batch = True
            return
        try:
            self._decoder, head = _parts(model)
            self.size = self._checked_size(head)
        except Exception as error:  # mlx-lm's models raise whatever they raise
            raise ModelError(
                f"where models of the family {loaded.family!r} keep their hidden states is not "
                f"known ({error})"
            ) from error
        self.can_batch = self._rows_are_apart()

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """[B, T, size], in the model's dtype, of token ids [B, T].

        Without a cache rows may be padded at their ends: what is computed there means nothing.

        Args:
            cache: States, read and advanced; None for whole sequences.
        """
        hidden: mx.array = self._decoder(tokens, cache=cache)
        return hidden

    def _checked_size(self, head: Callable[[mx.array], mx.array]) -> int:
        tokens = mx.array(_TOKENS[:1], mx.int32)
        hidden = self(tokens, self._loaded.make_cache())
        logits = self._loaded.model(tokens, cache=self._loaded.make_cache())
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            raise ValueError("its decoder returns something else")
        got, want = _last(head(hidden)), _last(logits)
        if got.shape != want.shape:
            raise ValueError("its head makes no logits of what its decoder returns")
        ordered = want[np.argsort(got)]
        if np.max(np.maximum.accumulate(ordered) - ordered) > _TOLERANCE * np.ptp(want):
            raise ValueError("its head makes other logits of what its decoder returns")
        return int(hidden.shape[2])

    def _rows_are_apart(self) -> bool:
        longest = max(map(len, _TOKENS))
        rows = [row + row[-1:] * (longest - len(row)) for row in _TOKENS]
        try:
            together = self(mx.array(rows, mx.int32))
            for index, row in enumerate(_TOKENS):
                alone = _last(self(mx.array([row], mx.int32), self._loaded.make_cache()))
                batched = _last(together[index : index + 1, : len(row)])
                if not np.max(np.abs(batched - alone)) <= _TOLERANCE * np.ptp(alone):
                    return False
        except Exception:  # as above
            return False
        return True


def _parts(model: nn.Module) -> tuple[Any, Callable[[mx.array], mx.array]]:
    """A model's decoder, and its head."""
    while "lm_head" not in model and "language_model" in model:
        model = model["language_model"]
    name = next((name for name in _DECODERS if name in model), None)
    if name is None:
        raise ValueError(f"it has none of {', '.join(_DECODERS)}")
    decoder = model[name]
    if "lm_head" in model:
        return decoder, model["lm_head"]
    embedding = next((name for name in _EMBEDDINGS if name in decoder), None)
    if embedding is None:
        raise ValueError("it has no head")
    return decoder, decoder[embedding].as_linear


def _last(x: mx.array) -> np.ndarray:
    """The last token's numbers."""
    return np.array(x[0, -1].astype(mx.float32))
