"""`gryphon run`: one prompt, answered on standard output as it is generated."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import uuid

import msgspec

from app.cli import RUN_MAX_TOKENS
from app.cli.constraint import constraint_of
from app.cli.models import model_for
from app.cli.terminal import StatusLine, Thinking, bar, write_answer
from app.engine.client import EngineClient
from app.engine.protocol import (
    MAX_FRAME_BYTES,
    Accepted,
    DraftModel,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Progress,
    PromptLookup,
    Sampling,
    Token,
    Usage,
    check_request,
)
from app.errors import GryphonError
from app.library.adapters import with_adapter
from app.library.installed import find_model

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
_PHASES = {"queue": "waiting", "swap": "waiting", "load": "loading", "prefill": "reading"}


def run(arguments: argparse.Namespace) -> int:
    """Answer one prompt."""
    prompt = _read_prompt(arguments.prompt)
    request = _request(arguments, prompt, ModelRef("", ""))
    check_request(request)  # wrong options are refused before a model is fetched
    model = model_for(arguments.model, yes=arguments.yes)
    if arguments.adapter is not None:
        directory = arguments.adapter.expanduser()
        model = with_adapter(model, directory, directory.resolve().name)
    request = msgspec.structs.replace(request, model=model.ref, speculation=_speculation(arguments))
    return asyncio.run(
        _answer(
            request,
            as_json=arguments.json,
            stats=arguments.stats,
            hide_thinking=arguments.hide_thinking,
            asked_length=arguments.max_tokens is not None,
        )
    )


def _speculation(arguments: argparse.Namespace) -> PromptLookup | DraftModel | None:
    if arguments.draft is not None:
        return DraftModel(find_model(arguments.draft, allow_path=True).ref)
    return PromptLookup() if arguments.prompt_lookup else None


def _read_prompt(argument: str | None) -> str:
    piped = ""
    if not sys.stdin.isatty():
        try:
            piped = sys.stdin.read(MAX_FRAME_BYTES + 1)
        except UnicodeDecodeError as error:
            raise GryphonError("usage", f"Standard input is not UTF-8 text ({error}).") from error
        if len(piped) > MAX_FRAME_BYTES:
            raise GryphonError(
                "request_too_large",
                f"Standard input holds more than {MAX_FRAME_BYTES} characters. Send less text.",
            )
    parts = [part for part in (piped, argument) if part]
    if any("\udc80" <= character <= "\udcff" for part in parts for character in part):
        raise GryphonError("usage", "The prompt is not UTF-8 text.")
    if not "".join(parts).strip():
        raise GryphonError(
            "usage", 'There is no prompt. Give one: gryphon run "Why is the sky blue?"'
        )
    return "\n\n".join(parts)


def _request(arguments: argparse.Namespace, prompt: str, model: ModelRef) -> GenerationRequest:
    if arguments.raw and arguments.system:
        raise GryphonError("usage", "--system needs a chat template, so it excludes --raw.")
    messages = [Message("system", arguments.system)] if arguments.system else []
    messages.append(Message("user", prompt))
    chosen = {name: getattr(arguments, name) for name in _SAMPLING}
    chosen["logit_bias"] = _logit_bias(arguments.logit_bias) or None
    return GenerationRequest(
        id=uuid.uuid4().hex,
        model=model,
        messages=None if arguments.raw else messages,
        prompt=prompt if arguments.raw else None,
        sampling=Sampling(**chosen),
        max_tokens=RUN_MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        ignore_eos=arguments.ignore_eos,
        constraint=constraint_of(arguments),
        stop=arguments.stop,
        wait_for_model=not arguments.no_wait,
    )


def _logit_bias(pairs: list[str]) -> dict[int, float]:
    """Of "ID=BIAS", or llama.cpp's "ID+BIAS" and "ID-BIAS"."""
    bias: dict[int, float] = {}
    for pair in pairs:
        found = re.fullmatch(r"([0-9]+)(?:=|(?=[+-]))([+-]?[0-9.]+)", pair)
        try:
            if found is None:
                raise ValueError
            bias[int(found[1])] = float(found[2])
        except ValueError as error:
            raise GryphonError(
                "usage", f"--logit-bias takes ID=BIAS, for example 42=-3.5, got {pair!r}."
            ) from error
    return bias


async def _answer(
    request: GenerationRequest,
    *,
    as_json: bool,
    stats: bool,
    hide_thinking: bool,
    asked_length: bool,
) -> int:
    client = EngineClient()
    line = StatusLine()
    thinking = None if hide_thinking else Thinking()
    try:
        async for event in client.stream(request):
            if as_json:
                sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
                sys.stdout.flush()
            else:
                _show(event, line, thinking)
            if isinstance(event, Failed):
                if not as_json:
                    print(f"gryphon: {event.message}", file=sys.stderr)
                return 1
            if isinstance(event, Accepted) and event.notice:
                print(f"gryphon: {event.notice}", file=sys.stderr)
            if isinstance(event, Finished) and stats:
                print(_summary(event), file=sys.stderr)
            if isinstance(event, Finished) and event.reason == "length" and not asked_length:
                count = event.usage.completion_tokens
                hint = f"stopped after {count} tokens; --max-tokens N allows more"
                print(f"gryphon: {hint}", file=sys.stderr)
        return 0
    finally:
        line.clear()
        await client.close()


def _show(event: Event, line: StatusLine, thinking: Thinking | None) -> None:
    if isinstance(event, Progress):
        what = event.detail or _PHASES[event.phase]
        line.show(f"{what} {bar(event.processed, event.total)}" if event.total else what)
    elif isinstance(event, Token):
        line.clear()
        _show_thinking(event, thinking)
        write_answer(event.text)
        sys.stdout.flush()
    elif isinstance(event, (Finished, Failed)):
        line.clear()
        if isinstance(event, Finished):
            _show_thinking(event, thinking)
            write_answer(event.text + "\n")


def _show_thinking(event: Token | Finished, thinking: Thinking | None) -> None:
    if thinking is not None:
        thinking.show(event.reasoning)
        if event.text or isinstance(event, Finished):
            thinking.end()


def _summary(event: Finished) -> str:
    usage, timings = event.usage, event.timings
    return (
        f"[{usage.prompt_tokens} prompt tokens at {timings.prefill_tps(usage):.1f} tok/s, "
        f"{usage.completion_tokens} generated at {timings.decode_tps(usage):.1f} tok/s, "
        f"{_guesses(usage)}"
        f"ended by {event.reason}]"
    )


def _guesses(usage: Usage) -> str:
    if not usage.drafted_tokens:
        return ""
    share = usage.accepted_tokens / usage.drafted_tokens
    return f"{usage.accepted_tokens} of {usage.drafted_tokens} guesses right ({share:.0%}), "
