"""The process that finds out what one model can do, by rendering its chat template.

Imports no MLX. Ends with the answer on standard output, or with a status that is not 0.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from app.engine.abilities import Abilities
from app.engine.address_space import limit_address_space
from app.engine.chat_prompt import ChatPrompts
from app.engine.conversation import Message, Tool
from app.engine.template import ChatTemplate
from app.errors import GryphonError
from mlxmodels.tokenizer import Tokenizer, read_chat_templates

# The names that templates have for it; the first one found is the one.
_SWITCHES = ("enable_thinking", "thinking")
_EFFORT = "reasoning_effort"
_ADDRESS_SPACE_BYTES = 4 * 1024**3
_QUESTION = [Message("user", "0")]


def abilities_of(directory: Path) -> Abilities:
    """What the model in `directory` can do.

    Raises:
        GryphonError, ModelError, OSError: its template or tokenizer cannot be read.
    """
    sources = read_chat_templates(directory)
    source = sources.get("default", "")
    if not source:
        return Abilities()
    special_tokens = Tokenizer.from_directory(directory).special_tokens
    variables = ChatTemplate(source, special_tokens).variables
    switch = next((name for name in _SWITCHES if name in variables), "")
    effort = _EFFORT if _EFFORT in variables else ""
    prompts = ChatPrompts(sources, special_tokens)
    format = prompts.prompt(_QUESTION).format
    return Abilities(
        tools=_can_call(prompts),
        thinks=format.reasoning is not None or bool(switch or effort),
        thinks_unasked=format.begins_reasoning,
        switch=switch,
        effort=effort,
        template=source,
    )


def _can_call(prompts: ChatPrompts) -> bool:
    try:
        return bool(prompts.prompt(_QUESTION, [Tool("gryphon_probe")]).format.calls)
    except GryphonError:
        return False


def main() -> None:
    """Entry point: the directory and the time limit in seconds are its arguments."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
    limit_address_space(_ADDRESS_SPACE_BYTES)
    found = msgspec.json.encode(abilities_of(Path(sys.argv[1])))
    sys.stdout.buffer.write(found)


if __name__ == "__main__":
    main()
