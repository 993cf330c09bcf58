"""What the engine keeps of deleted chats goes too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from app.history.store import History


async def forget_deleted(history: History, forget: Callable[[str], Awaitable[None]]) -> None:
    """Have the engine drop what it keeps of chats that were deleted, in this session or before a
    kill. Call it after a deletion, and once after opening.

    Args:
        forget: `EngineClient.forget_chat`.

    Raises:
        GryphonError: what it raises; the chat stays on the list for the next time.
    """
    for name in history.to_forget():
        await forget(name)
        history.forgot(name)
