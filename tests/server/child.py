"""A server in a process of its own: `python -m tests.server.child '{"model": …}'` prints its URL.

Its engine is scripted, and never ends an answer to a prompt that holds the word "endless"; or the
real one, over the model directory that "model" names. Other options are those of ServerOptions.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from app.engine.client import EngineClient
from app.engine.protocol import Event, GenerationRequest
from app.library.installed import InstalledModel
from app.server.generation import Engine
from app.server.serving import ServerOptions, serve_forever

from ..fakes import FakeEngine
from .conftest import SMOL, FakeModels


class Endless(FakeEngine):
    """Answers "Hello there." to all but those who ask for more."""

    def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        if b"endless" in msgspec.json.encode(request):
            self.answers = [["a", asyncio.Event()]]
        return super().stream(request)


class OneModel(FakeModels):
    """One installed model, under the name that the tests use."""

    def __init__(self, path: Path) -> None:
        family = "recurrent_gemma"
        self.model = InstalledModel(SMOL.name, path, family, 1, "float32", None, "gryphon", 0.0)

    def installed_models(self) -> list[InstalledModel]:
        return [self.model]


def main(options: dict[str, Any]) -> None:
    model = options.pop("model", None)
    if "socket" in options:
        options["socket"] = Path(options["socket"])
    factory: type[Engine] = EngineClient if model else Endless
    serve_forever(
        factory,
        ServerOptions(port=0, **options),
        models=OneModel(Path(model)) if model else FakeModels(),
        on_ready=lambda url: print(url, flush=True),
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
