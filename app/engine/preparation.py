"""Text and token ids become each other here, in a small process of their own, under a time limit.

Rendering runs code that came with a model, and a megabyte of text takes seconds to tokenize:
neither may hold the MLX thread's interpreter lock or hang the engine. The process arms an alarm
before each prompt and is killed by it when the work takes longer, even inside native code; the
engine then reports the failure and starts another. It also ends when the engine goes away.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import json
import signal
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from app.engine.address_space import limit_address_space
from app.engine.conversation import Message, Tool, ToolCallPart
from app.engine.preparation_work import Prepared, Texts, Work
from app.engine.preparation_work import Prompt as Prompt
from app.engine.preparation_work import TokenizedPrompt as TokenizedPrompt
from app.engine.requests import Infill
from app.errors import GryphonError, readable
from app.settings import child_environment

if TYPE_CHECKING:
    from app.engine.chat_prompt import ChatPrompts

# A template can multiply strings; beyond this the process fails alone.
_ADDRESS_SPACE_BYTES = 8 * 1024**3


class Preparer:
    """Engine side: one preparation process, started when first needed, used from one event loop."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    async def prepare(self, prompt: Prompt) -> TokenizedPrompt:
        """Token ids of a prompt, at least one.

        Raises:
            GryphonError: as `answer`, "invalid_request" (no token came out).
        """
        return (await self.answer(prompt)).prompt

    async def answer(self, work: Work) -> Prepared:
        """What becomes of a piece of work.

        Raises:
            GryphonError: "template_error", "invalid_model", "no_infill", "prompt_too_slow" (the
                limit passed), "prompt_failed".
        """
        async with self._one_at_a_time:
            try:
                answer = await self._ask(work)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                code = await self._end()
                if code == -signal.SIGALRM:
                    raise GryphonError(
                        "prompt_too_slow",
                        f"Preparing this prompt took longer than {self._time_limit_s:g} s: it is "
                        "very long, or the model's chat template does not end. Shorten it.",
                    ) from error
                raise GryphonError(
                    "prompt_failed",
                    f"Preparing this prompt ended the preparation process (exit status {code}), "
                    "probably for lack of memory. Shorten it.",
                ) from error
            except asyncio.CancelledError:
                await self._end()  # its answer would reach the next prompt
                raise
        if answer.error is not None:
            raise GryphonError(*answer.error)
        return answer

    async def close(self) -> None:
        await self._end()

    async def _ask(self, work: Work) -> Prepared:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-P", "-m", "app.engine.preparation", str(self._time_limit_s)],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A native library that fails quotes what it was given, and this would be the log.
                stderr=asyncio.subprocess.DEVNULL,
                limit=2**26,
                env=child_environment(TOKENIZERS_PARALLELISM="false"),
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        body = msgspec.msgpack.encode(work)
        stdin.write(struct.pack(">I", len(body)) + body)
        await stdin.drain()
        (size,) = struct.unpack(">I", await stdout.readexactly(4))
        return msgspec.msgpack.decode(await stdout.readexactly(size), type=Prepared)

    async def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None and process.stdin is not None:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), timeout=0.5)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    process.kill()
        return await process.wait()


class _Prompts:
    """Process side: tokenizer and template of the model used last."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._path: str | None = None

    def done(self, work: Work) -> Prepared:
        """What becomes of a piece of work."""
        if isinstance(work, Prompt):
            made = self.tokenized(work)
            return Prepared(_packed(made.tokens), *made[1:])
        self._open(work.model_path)
        if isinstance(work, Texts):
            encode, flags = self._tokenizer.encode, (work.add_special, work.parse_special)
            each = [encode(text, *flags) for text in work.texts]
            return Prepared(_packed(itertools.chain(*each)), lengths=[len(ids) for ids in each])
        if work.wanted == "pieces":
            return Prepared(pieces=[self._tokenizer.token_bytes(id) for id in work.tokens])
        if work.wanted == "spelled":
            return Prepared(text=self._spelled(work.tokens))
        return Prepared(text=self._tokenizer.decode(work.tokens))

    def _spelled(self, ids: Sequence[int]) -> str:
        tokenizer, text = self._tokenizer, ""
        for is_special, run in itertools.groupby(ids, tokenizer.special_ids.__contains__):
            if is_special:
                text += "".join(tokenizer.token(id) or "" for id in run)
            else:
                text += tokenizer.decode(run)
        return text

    def _open(self, path: str) -> None:
        from app.engine.template import PromptEncoder
        from mlxmodels.tokenizer import Tokenizer

        if path == self._path:
            return
        tokenizer = Tokenizer.from_directory(path)
        self._encoder = PromptEncoder(tokenizer)  # which may fail: nothing of it is kept then
        self._tokenizer = tokenizer
        self._chats: ChatPrompts | None = None
        self._path = path

    def tokenized(self, prompt: Prompt) -> TokenizedPrompt:
        """Token ids of a prompt, and what else is known of it."""
        from app.engine.call_grammar import call_grammar
        from app.engine.chat_prompt import ChatPrompts
        from app.engine.infill_prompt import infill_prompt
        from mlxmodels.tokenizer import read_chat_templates

        self._open(prompt.model_path)
        if prompt.messages is None:
            assert prompt.text is not None
            if prompt.suffix or prompt.infill is not None:
                parts = prompt.text, prompt.suffix, prompt.infill or Infill()
                gap = infill_prompt(self._tokenizer, self._encoder.prefix, *parts)
                return TokenizedPrompt(gap.tokens, gap.boundaries, ends=gap.ends)
            return TokenizedPrompt(self._encoder.encode(prompt.text), [])
        if self._chats is None:  # only now: a broken one must not spoil plain completions
            sources = read_chat_templates(prompt.model_path)
            self._chats = ChatPrompts(sources, self._tokenizer.special_tokens)
        started = time.monotonic()
        arguments = prompt.messages, prompt.tools, prompt.template_options
        chat = self._chats.prompt(*arguments, opens_turn=prompt.opens_turn)
        call = None
        if prompt.tool_choice not in ("auto", "none"):
            call = call_grammar(chat.format, prompt.tools, prompt.tool_choice, self._tokenizer)
        tokens = self._encoder.encode(chat.text)
        boundaries: set[int] = set()
        # Boundaries take about that long again for each: they must not be what exceeds the limit.
        if prompt.is_prefix and time.monotonic() - started <= self._time_limit_s / 8:
            others = _likely_conversations(prompt.messages, prompt.tools)
            boundaries = {self._boundary(chat.text, tokens, other, prompt) for other in others}
        return TokenizedPrompt(tokens, sorted(boundaries - {0}), chat.format, chat.notice, call)

    def _boundary(self, text: str, tokens: list[int], other: list[Message], prompt: Prompt) -> int:
        """How many tokens this prompt shares with another conversation's, 0 if that has none."""
        assert self._chats is not None
        try:
            rendered = self._chats.prompt(other, prompt.tools, prompt.template_options).text
        except GryphonError:  # the template has its own idea of what may follow what
            return 0
        # White space belongs to a token with whatever follows it in the one or the other.
        shared = text[: shared_length(text, rendered)].rstrip()
        return shared_length(tokens, self._encoder.encode(shared))


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _likely_conversations(
    messages: Sequence[Message], tools: Sequence[Tool]
) -> list[list[Message]]:
    """What this conversation may become: its next turn, the result of a call, and an edit of its
    last user message.

    Rendered by the model's own template they show what of a prompt stays, where a rule of ours for
    where messages begin would be wrong for some template.
    """
    others = [[*messages, Message("assistant", "0"), Message("user", "0")]]
    if tools:
        call = ToolCallPart("call_000000000000000000000000", tools[0].name, "{}")
        result = Message("tool", "0", tool_call_id=call.id)
        others.append([*messages, Message("assistant", "", tool_calls=[call]), result])
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is not None:
        content = "1" if messages[last].content.lstrip().startswith("0") else "0"
        edited = msgspec.structs.replace(messages[last], content=content)
        others.append([*messages[:last], edited, *messages[last + 1 :]])
    return others


def _packed(ids: Iterable[int]) -> bytes:
    return array.array("i", ids).tobytes()


def _failed(code: str, message: str) -> Prepared:
    return Prepared(error=(code, readable(message)))


def _serve(requests: BinaryIO, answers: BinaryIO, time_limit_s: float) -> None:
    from mlxmodels.errors import ModelError

    prompts = _Prompts(time_limit_s)
    while len(head := requests.read(4)) == 4:
        work = msgspec.msgpack.decode(requests.read(struct.unpack(">I", head)[0]), type=Work)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        try:
            answer = prompts.done(work)
        except GryphonError as error:
            answer = _failed(error.code, error.message)
        except ModelError as error:
            answer = _failed("invalid_model", str(error))
        except (OSError, json.JSONDecodeError) as error:
            answer = _failed("invalid_model", f"The model cannot be read: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        body = msgspec.msgpack.encode(answer)
        answers.write(struct.pack(">I", len(body)) + body)
        answers.flush()


def main() -> None:
    """Entry point of the preparation process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit_address_space(_ADDRESS_SPACE_BYTES)
    _serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))


if __name__ == "__main__":
    main()
