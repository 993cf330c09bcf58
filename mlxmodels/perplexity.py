"""How well a model foretells a text.

`python -m mlxmodels.perplexity DIRECTORY FILE [float32]` prints {"done", "total"} in tokens, then
{"perplexity", "tokens", "window"}, or {"message"}; a JSON object a line.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxmodels.errors import ModelError
from mlxmodels.loading import LoadedModel, load

WINDOW = 1024
"""Tokens read in one go, beginning anew with nothing known. At most the model's context."""

_CHUNK = 128
_LOGITS = 1 << 24
"""Of a chunk; they are the most that a chunk takes."""
MAX_TEXT_BYTES = 64_000_000


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability, over every token but the first of each window."""

    perplexity: float
    tokens: int
    """That were foretold."""
    window: int


def perplexity(
    loaded: LoadedModel, text: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Read the text in windows, in chunks within them.

    Where the model opens sequences with a token of its own, every window begins with it.

    Raises:
        ModelError: the text is too short.
    """
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    bos = loaded.tokenizer.bos_token_id
    opened = loaded.tokenizer.encode("a", add_special_tokens=True)
    opening = [bos] if bos is not None and opened[:1] == [bos] else []
    window = min(WINDOW, loaded.context_length or WINDOW)
    step = window - len(opening)
    if step < 2:
        raise ModelError(f"a context of {window} tokens is too short to foretell anything in.")
    total, count = 0.0, 0
    for start in range(0, len(ids), step):
        rows = opening + ids[start : start + step]
        if len(rows) > 1:
            total += _surprise(loaded, rows)
            count += len(rows) - 1
        progress(min(start + step, len(ids)), len(ids))
    if count == 0:
        raise ModelError(f"the text has {len(ids)} tokens; it takes two at least.")
    mean = total / count
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, count, window)


def _surprise(loaded: LoadedModel, ids: list[int]) -> float:
    """Sum of negative log-probabilities of ids[1:], each given those before it."""
    caches = loaded.make_cache()
    loaded.begin_prompt(caches, len(ids) - 1)
    total, start, chunk = 0.0, 0, 1
    while start < len(ids) - 1:
        stop = min(start + chunk, len(ids) - 1)
        logits = loaded.model(mx.array([ids[start:stop]]), cache=caches)[0].astype(mx.float32)
        wanted = mx.array(ids[start + 1 : stop + 1])[:, None]
        chosen = mx.take_along_axis(logits, wanted, axis=-1)[:, 0]
        lost = mx.logsumexp(logits, axis=-1) - chosen
        total += float(np.array(lost.sum()))
        mx.eval([state.state for state in caches if hasattr(state, "state")])
        chunk = max(1, min(_CHUNK, _LOGITS // logits.shape[-1]))
        start = stop
    return total


def main(arguments: list[str]) -> int:
    """Entry point of the child process."""
    directory, file = map(Path, arguments[:2])
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"{file} has more than {MAX_TEXT_BYTES:,} bytes; give a part of it.")
        text = file.read_text(encoding="utf-8")
        loaded = load(directory, dtype=mx.float32 if "float32" in arguments[2:] else None)
        found = perplexity(loaded, text, lambda done, total: _say(done=done, total=total))
    except (UnicodeDecodeError, OSError, ModelError) as error:
        reason = (
            f"{file} is not a text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        )
        _say(message=str(reason))
        return 1
    _say(**asdict(found))
    return 0


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
