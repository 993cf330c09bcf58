"""What a terminal too small for the chat shows instead of it."""

from __future__ import annotations

from textual.widgets import Static

MIN_WIDTH, MIN_HEIGHT = 40, 12


class TooSmall(Static):
    """Covers the chat, which goes on underneath: nothing is lost and typing still arrives."""

    def __init__(self) -> None:
        super().__init__(
            f"Terminal too small: needs {MIN_WIDTH}x{MIN_HEIGHT}.", id="too-small", markup=False
        )
