"""What a model can do, as its chat template and tokenizer say: asked of a process of their own.

A template is code that came with a download; finding out what it can do runs it. So a small process
does, under a time limit (`app.engine.ability_probe`), and neither a face nor the engine waits for
anything but its answer. No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from app.engine.protocol import ModelRef
from app.errors import GryphonError
from app.settings import child_environment

TIME_LIMIT_S = 10.0
_MOST_KNOWN = 256


class Abilities(msgspec.Struct, frozen=True):
    """Of one model."""

    tools: bool = False
    """Whether it can be told of tools, and its calls can be read."""
    thinks: bool = False
    """Whether it reasons before it answers, always or when asked to."""
    thinks_unasked: bool = False
    """Whether its template begins the reasoning itself where no option says otherwise."""
    switch: str = ""
    """The template option that turns reasoning on and off; empty where there is none."""
    effort: str = ""
    """The one that says how much of it ("low", "medium", "high"); empty where there is none."""
    template: str = ""
    """The chat template's text; empty for a base model."""


class AbilityFinder:
    """Asks once for each state of a model's directory. Used from one event loop."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, float], Abilities] = {}
        self._one_at_a_time = asyncio.Lock()

    async def of(self, model: ModelRef, modified: float) -> Abilities:
        """What the model can do.

        Args:
            modified: When its files were changed last; what was found out of older ones is dropped.

        Raises:
            GryphonError: "template_error": the template or tokenizer is broken, or too slow.
        """
        key = (model.path, modified)
        async with self._one_at_a_time:
            if key not in self._known:
                found = await _found(model)
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[key] = found
            return self._known[key]


async def _found(model: ModelRef) -> Abilities:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-P", "-m", "app.engine.ability_probe", model.path, str(TIME_LIMIT_S)],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # What fails in there may quote the template, and this would be the terminal.
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment(TOKENIZERS_PARALLELISM="false"),
    )
    try:
        answer, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise GryphonError(
            "template_error",
            f"What {model.name} can do was not found out: its chat template or its tokenizer is "
            f"broken, or takes longer than {TIME_LIMIT_S:g} s. `gryphon verify {model.name}` finds "
            "damage.",
        )
    return msgspec.json.decode(answer, type=Abilities)
