"""oterm, driven by its keys without a terminal: a new chat, a question, the answer on the screen.
OLLAMA_URL and OTERM_DATA_DIR say where. Argument: the model."""

import asyncio
import json
import sys
from importlib.metadata import version

from oterm.app.oterm import app
from textual.widgets import OptionList


async def main() -> None:
    (model,) = sys.argv[1:]
    async with app.run_test(size=(140, 45)) as pilot:

        async def until(claim, what: str) -> None:
            for _ in range(1200):
                if claim():
                    return
                await pilot.pause(0.05)
            sys.exit(f"oterm never had {what}")

        def names() -> list[str]:
            lists = app.screen.query("#model-select-options").results(OptionList)
            return [str(option.prompt) for one in lists for option in one.options]

        await pilot.press("ctrl+n")
        await until(names, "a list of models")
        offered = names()
        wanted = next(name for name in offered if name.removesuffix(":latest") == model)
        await pilot.click("#model-select-input")
        await pilot.press(*["down"] * (offered.index(wanted) + 2), "enter")
        await until(lambda: not app.screen.query_one("#save-btn").disabled, "what the model can do")
        await pilot.click("#save-btn")
        await until(lambda: len(app.screen.query("#prompt")) == 1, "an open chat")
        app.screen.query_one("#prompt").focus()
        await pilot.press("H", "i", "enter")
        await until(lambda: "there." in app.export_screenshot(), "the answer on its screen")
    print(json.dumps({"version": version("oterm"), "models": offered}))


asyncio.run(main())
