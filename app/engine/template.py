"""Chat templates: sandboxed rendering, and exactly one BOS, here and nowhere else.

A template is code that came with a download. It runs in Jinja's immutable sandbox, in the
preparation process (`app.engine.preparation`) that ends itself when it takes too long.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from app.errors import GryphonError
from mlxmodels.tokenizer import Tokenizer

# Of what a template says of its failure, which may quote the conversation.
_MAX_SAID = 500


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks for training what the assistant said; here only its contents."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


class ChatTemplate:
    """One chat template, compiled once. It is given what transformers gives it.

    Args:
        source: Jinja text.
        special_tokens: Texts of the special tokens, by names such as "bos_token".

    Attributes:
        variables: Names that it looks up and does not set itself.

    Raises:
        GryphonError: "template_error", when the text is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        # Templates add these two without asking whether they are there.
        self._tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # what is nested too deeply fails Python's compiler
            line = getattr(error, "lineno", None)
            where = "" if line is None else f"line {line}: "
            raise GryphonError(
                "template_error",
                f"The model's chat template is not valid Jinja ({where}"
                f"{str(error)[:_MAX_SAID] or type(error).__name__}). Use a plain completion, or "
                "another build of this model.",
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        opens_turn: bool = True,
    ) -> str:
        """The conversation as the model was trained to see it.

        Args:
            messages: In OpenAI's shape, as are `tools`.
            options: More variables.
            opens_turn: Whether it is open for the assistant's turn.

        Raises:
            GryphonError: "template_error", when the template refuses the conversation (a role or an
                order it does not know) or fails.
        """
        try:
            return self._template.render(
                {
                    **(options or {}),
                    "messages": messages,
                    "tools": tools,
                    "xml_tools": tools and [tool["function"] for tool in tools],  # SmolLM3's name
                    "documents": None,
                    "add_generation_prompt": opens_turn,
                    **self._tokens,
                }
            )
        except Exception as error:  # whatever a template does is the template's failure
            raise GryphonError(
                "template_error",
                f"The model's chat template does not accept this conversation: "
                f"{str(error)[:_MAX_SAID] or type(error).__name__}",
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
        self.prefix = full[: starts[0]] if starts else []
        """Ids that open a sequence."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never empty for a tokenizer that has a prefix."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        size, start = len(self.prefix), 0
        while size and ids[start : start + size] == self.prefix:
            start += size
        return [*self.prefix, *ids[start:]]
