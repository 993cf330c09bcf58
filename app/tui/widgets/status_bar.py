"""One line that always says what the engine is doing."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

_SEPARATOR = " · "


@dataclass(frozen=True)
class Status:
    """What the bar shows; empty strings and zeros are left out."""

    model: str = ""
    state: str = ""
    tps: float = 0.0
    context_used: int = 0
    context_limit: int | None = None
    rest: str = ""
    """URL of the REST endpoint, or that it is off."""


class StatusBar(Static):
    """Left: model, state, speed, context. Right: the REST endpoint."""

    status: reactive[Status] = reactive(Status())

    def __init__(self) -> None:
        super().__init__(id="status")

    def render(self) -> Content:
        return Content(lay_out(self.status, self.size.width))


def lay_out(status: Status, width: int) -> str:
    """The bar's text in exactly `width` cells; what matters least goes first when it is narrow."""
    speed = f"{status.tps:.1f} tok/s" if status.tps else ""
    context = short_context = ""
    if status.context_used and status.context_limit:
        context = f"context {status.context_used}/{status.context_limit}"
        short_context = f"ctx {100 * status.context_used // status.context_limit}%"
    elif status.context_used:
        context = short_context = f"{status.context_used} tokens"
    address = status.rest.removeprefix("http://")
    model = status.model
    short_model = _shorten(model.rsplit("/", 1)[-1], 16)

    for left, right in (
        ([model, status.state, speed, context], status.rest),
        ([model, status.state, speed, context], address),
        ([model, status.state, speed, context], ""),
        ([short_model, status.state, speed, context], ""),
        ([short_model, status.state, speed, short_context], ""),
        ([short_model, status.state, speed], ""),
        ([short_model, status.state], ""),
        ([status.state], ""),
    ):
        text = _SEPARATOR.join(part for part in left if part)
        gap = width - cell_len(text) - cell_len(right)
        if gap >= (2 if right else 0):
            return text + " " * gap + right
    return set_cell_size(status.state, width)


def _shorten(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"
