"""Chat templates: sandboxed rendering, and exactly one BOS, here and nowhere else.

A template is code that came with a download. It runs in Jinja's immutable sandbox, in the
preparation process (`app.engine.preparation`) that ends itself when it takes too long.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from app.engine.protocol import Message
from app.errors import GryphonError
from mlxmodels.tokenizer import Tokenizer


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


class ChatTemplate:
    """A model's chat template, compiled once.

    Args:
        source: Jinja text; None for a base model that has none.
        bos_token, eos_token: The special tokens' text, which templates may write.

    Raises:
        GryphonError: "template_error", when the text is not a Jinja template.
    """

    def __init__(self, source: str | None, bos_token: str | None, eos_token: str | None) -> None:
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise GryphonError(
                "template_error",
                f"The model's chat template is not valid Jinja (line {error.lineno}: "
                f"{error.message}). Use a plain completion, or another build of this model.",
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model was trained to see it, open for the assistant's turn.

        A base model has no template: it gets the contents alone, separated by blank lines.

        Raises:
            GryphonError: "template_error", when the template refuses the conversation (a role or an
                order it does not know) or fails.
        """
        if self._template is None:
            return "\n\n".join(message.content for message in messages)
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # whatever a template does is the template's failure
            raise GryphonError(
                "template_error",
                f"The model's chat template does not accept this conversation: "
                f"{error or type(error).__name__}",
            ) from error


class PromptEncoder:
    """Text to token ids with the tokenizer's prefix (BOS, for most) exactly once.

    A template may write the prefix itself, a tokenizer may add it, and a person may paste it; a
    suffix (EOS) that a tokenizer appends is left out, because the text is to be continued.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        plain = tokenizer.encode("a", add_special_tokens=False)
        full = tokenizer.encode("a", add_special_tokens=True)
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        self._prefix = full[: starts[0]] if starts else []

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never empty for a tokenizer that has a prefix."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        size = len(self._prefix)
        while size and ids[:size] == self._prefix:
            ids = ids[size:]
        return [*self._prefix, *ids]
