"""An answer that is computed before any of it is sent; a client that goes away cancels that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.server.errors import JsonResponse
from app.server.generation import client_left


class ComputedResponse(Response):
    """Sends what `compute` returns as JSON. What it raises is the application's to answer."""

    def __init__(self, compute: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        super().__init__()
        self.compute = compute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        computing = asyncio.create_task(self.compute())
        leaving = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait({computing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            computing.cancel()
            leaving.cancel()
            await asyncio.wait({computing, leaving})
        if not computing.cancelled():
            await JsonResponse(computing.result())(scope, receive, send)
