"""Writes the pictures of the terminal chat that README shows, from the real application.

    .venv/bin/python scripts/screenshot.py        # docs/chat.svg

A real model answers; the picture is taken while it does.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
from pathlib import Path

from app.engine.client import EngineClient
from app.history.store import History
from app.library.installed import find_model
from app.tui.app import ChatApp

DOCS = Path(__file__).parent.parent / "docs"
ENOUGH = 420
QUESTION = "Give me three short tips for sleeping well."


async def take(path: Path, size: tuple[int, int], model_name: str | None) -> None:
    """Ask a question and save the screen once some of the answer is there."""
    with tempfile.TemporaryDirectory() as directory:
        app = ChatApp(
            history=History(Path(directory) / "history.sqlite3"),
            model=find_model(model_name),
            engine_factory=EngineClient,
        )
        async with app.run_test(size=size) as pilot:
            await pilot.press(*QUESTION, "enter")
            while not (answer := app.session.answering) or not (
                answer.ended.is_set() or len(answer.text) > ENOUGH
            ):
                await pilot.pause(0.1)
            picture = app.export_screenshot(title="Gryphon")
            await pilot.press("ctrl+q")
    # Textual's picture asks a font server for its font; ours asks nobody for anything.
    path.write_text(re.sub(r"@font-face\s*{.*?}", "", picture, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model")
    arguments = parser.parse_args()
    asyncio.run(take(DOCS / "chat.svg", (96, 28), arguments.model))
    print(DOCS / "chat.svg")


if __name__ == "__main__":
    main()
