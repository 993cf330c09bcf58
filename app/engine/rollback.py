"""Taking back tokens that a model's layer states have read.

Keys and values of every token are trimmed. A recurrence and a full window have no way back, so what
they were before is kept; that is a reference to arrays, not a copy, as states are replaced and not
written in place (mlx-lm's, which are, get handles of their own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.engine.state_leaves import always_trimmable, copied, is_trimmable
from mlxmodels.cache import LayerState


class Checkpoint:
    """A model's layer states as they are now.

    Raises:
        ValueError: one of them is of a kind that cannot be kept; see `state_leaves.can_keep`.
    """

    def __init__(self, states: Sequence[Any]) -> None:
        self._kept = [None if always_trimmable([state]) else _kept(state) for state in states]

    def back(self, states: Sequence[Any], tokens: int) -> list[Any]:
        """These states without the `tokens` that they have read since; use it once."""
        for state, kept in zip(states, self._kept, strict=True):
            if kept is None:
                state.trim(tokens)
        pairs = zip(states, self._kept, strict=True)
        return [state if kept is None else kept for state, kept in pairs]


def trimmed(states: Sequence[Any], tokens: int) -> bool:
    """Take the last `tokens` out of all of these states if that is possible, else of none."""
    if not all(is_trimmable(state) for state in states):
        return False
    for state in states:
        state.trim(tokens)
    return True


def _kept(state: Any) -> Any:
    if isinstance(state, LayerState):
        return type(state).from_state(state.state)
    return copied([state])[0]
