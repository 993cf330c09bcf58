"""The preparation process: reused, killed by its own alarm, replaced, never an orphan."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.engine.preparation import Preparer, Prompt, shared_length
from app.engine.protocol import Message, Tool, ToolCallPart
from app.errors import GryphonError

from ..tiny_models import OPEN_LLAMA, write_model
from .test_chat_prompt import DEEPSEEK, QWEN3


@pytest.fixture
async def preparer() -> AsyncIterator[Preparer]:
    preparer = Preparer(time_limit_s=2.0)
    yield preparer
    await preparer.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", OPEN_LLAMA)


def _with_template(model: Path, source: str) -> Prompt:
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    return Prompt(str(model), messages=[Message("user", "Hi")])


async def test_text_and_messages_become_ids_in_one_process(preparer: Preparer, model: Path) -> None:
    prepared = await preparer.prepare(Prompt(str(model), text="héllo"))
    assert len(prepared.tokens) == 6
    first = preparer._process
    tokens, *_ = await preparer.prepare(Prompt(str(model), messages=[Message("user", "Hi")]))
    assert 256 in tokens and 257 in tokens  # the template's special tokens, not their letters
    assert preparer._process is first


async def test_prompts_at_once_each_get_their_own_answer(preparer: Preparer, model: Path) -> None:
    texts = ["a" * n for n in range(1, 9)]
    prepared = await asyncio.gather(
        *(preparer.prepare(Prompt(str(model), text=text)) for text in texts)
    )
    assert [len(prompt.tokens) for prompt in prepared] == list(range(1, 9))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "prompt_too_slow"),
        ("{{ 'a' * 40000000000 }}", "template_error"),
        ("{{ raise_exception('No.') }}", "template_error"),
        ("{% if %}", "template_error"),
        ("{{ " + "[" * 300 + "]" * 300 + " }}", "template_error"),
        ("{{ raise_exception('\\ud800') }}", "template_error"),
    ],
    ids=["endless", "memory", "refusing", "broken", "nested", "no text"],
)  # fmt: skip
async def test_a_bad_template_fails_its_prompt_and_no_other(
    preparer: Preparer, model: Path, source: str, code: str
) -> None:
    with pytest.raises(GryphonError) as caught:
        await preparer.prepare(_with_template(model, source))
    assert caught.value.code == code
    assert len((await preparer.prepare(Prompt(str(model), text="fine"))).tokens) == 4


async def test_a_cancelled_prompt_does_not_answer_the_next(preparer: Preparer, model: Path) -> None:
    slow = asyncio.create_task(preparer.prepare(Prompt(str(model), text="x" * 3_000_000)))
    await asyncio.sleep(0)
    while preparer._process is None:
        await asyncio.sleep(0)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert len((await preparer.prepare(Prompt(str(model), text="abc"))).tokens) == 3


async def test_killed_from_outside_it_is_replaced(preparer: Preparer, model: Path) -> None:
    await preparer.prepare(Prompt(str(model), text="a"))
    assert preparer._process is not None
    preparer._process.kill()
    await preparer._process.wait()
    with pytest.raises(GryphonError, match="exit status -9"):
        await preparer.prepare(Prompt(str(model), text="b"))
    assert len((await preparer.prepare(Prompt(str(model), text="cc"))).tokens) == 2


async def test_it_ends_with_the_engine(model: Path) -> None:
    preparer = Preparer(time_limit_s=5)
    await preparer.prepare(Prompt(str(model), text="a"))
    process = preparer._process
    assert process is not None and process.stdin is not None
    process.stdin.close()  # as when the engine is killed
    assert await process.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK], ids=["qwen3", "deepseek"])
@pytest.mark.parametrize("calls", [False, True], ids=["answers", "calls"])
async def test_the_next_turn_parts_at_a_boundary_though_reasoning_is_dropped(
    model: Path, template: str, calls: bool
) -> None:
    """What a prompt shares with the next turn's is known before that turn is."""
    preparer = Preparer(time_limit_s=60)  # a slow machine leaves boundaries out
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    question = [Message("system", "Look things up."), Message("user", "Hi")]
    part = ToolCallPart("call_1", "look_up", '{"q": 1}')
    answer = Message("assistant", "Yes.", reasoning="Hm.", tool_calls=[part] if calls else [])
    then = Message("tool", "42", tool_call_id="call_1") if calls else Message("user", "More")
    tools = [Tool("look_up")]
    first, second = [
        await preparer.prepare(Prompt(str(model), messages=messages, tools=tools))
        for messages in (question, [*question, answer, then])
    ]
    await preparer.close()
    shared = shared_length(first.tokens, second.tokens)
    # A boundary leaves white space out, and may part from an empty answer a little earlier.
    near = [boundary for boundary in first.boundaries if shared - 30 <= boundary <= shared]
    assert near and first.format.calls
