"""Body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from app.engine.protocol import GenerationRequest, ModelRef
from app.server.openai_requests import (
    MAX_CHOICES,
    MAX_INT,
    WITHOUT_EFFECT,
    Alternatives,
    GenerationFields,
    spread,
)
from app.server.validation import refuse, shown

Prompt = str | list[int]


def _prompts(prompt: Any) -> list[Prompt]:
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    prompts: list[Any] = prompt if several else [prompt]
    if len(prompts) > MAX_CHOICES:
        raise refuse(
            "invalid_value",
            "{path} may hold {most} prompts at most, got {count}",
            most=str(MAX_CHOICES),
            count=str(len(prompts)),
        )
    if all(isinstance(one, str) for one in prompts):
        return prompts
    if all(isinstance(one, list) and one and all(map(_is_token_id, one)) for one in prompts):
        return prompts
    raise refuse(
        "invalid_value",
        "{path} should be a text, a list of token ids, or a list of either, got {value}",
        value=shown(prompt),
    )


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


_TEXT = {"type": "string"}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SEVERAL = {"minItems": 1, "maxItems": MAX_CHOICES}


class CompletionFields(GenerationFields):
    """Body of `POST /v1/completions`."""

    without_effect = WITHOUT_EFFECT

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_prompts),
        WithJsonSchema(
            {
                "anyOf": [
                    _TEXT,
                    _TOKENS,
                    {"type": "array", "items": _TEXT} | _SEVERAL,
                    {"type": "array", "items": _TOKENS} | _SEVERAL,
                ]
            }
        ),
    ]
    suffix: str | None = None
    """What follows the gap that the answer fills; the engine refuses models that cannot."""
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionFields:
        choices = self.n or 1
        if self.best_of is not None and self.best_of != choices:
            raise refuse(
                "unsupported_value",
                "{path} = {value} is not supported: no choice is dropped, so it should be {n}, "
                "which is `n`",
                field="best_of",
                value=str(self.best_of),
                n=str(choices),
            )
        if choices * len(self.prompt) > MAX_CHOICES:
            raise refuse(
                "invalid_value",
                "{path} and `prompt` ask for {count} choices; one request may have {most}",
                field="n",
                count=str(choices * len(self.prompt)),
                most=str(MAX_CHOICES),
            )
        for field in ("echo", "suffix"):
            if getattr(self, field) and not all(isinstance(one, str) for one in self.prompt):
                raise refuse(
                    "unsupported_value",
                    "{path} needs `prompt` to be text, not token ids",
                    field=field,
                )
        if self.echo and self.logprobs is not None:
            raise refuse(
                "unsupported_value",
                "{path} and `logprobs` cannot be combined: the prompt's own logprobs are not "
                "computed",
                field="echo",
            )
        return self

    @property
    def echoed(self) -> list[str]:
        """What each choice's text begins with; empty when that is nothing."""
        if not self.echo:
            return []
        return [str(prompt) for prompt in self.prompt for _ in range(self.n or 1)]

    def requests(self, id: str, model: ModelRef, client: str) -> list[GenerationRequest]:
        """One request for each choice of each prompt."""
        one = GenerationRequest(
            id=id,
            model=model,
            suffix=self.suffix or "",
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop=self.stop or [],
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            constraint=self.structured_outputs,
            client=client,
        )
        asked = [
            msgspec.structs.replace(
                one,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_tokens=prompt if isinstance(prompt, list) else None,
            )
            for prompt in self.prompt
        ]
        return spread(asked, self.n or 1)
