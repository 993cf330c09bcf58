"""Fields that OpenAI's routes share, and how many choices become as many requests.

What each route honours, accepts and refuses: docs/rest/openai.md, which the tests hold to the code.
Without `temperature` and the like the model's own recommendation holds, as in the other faces
(`engine.protocol.Sampling`); without a token limit an answer may fill what is left of the context.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from app.engine.protocol import GenerationRequest, Sampling
from app.server.answer_forms import StructuredOutputs
from app.server.errors import ApiError
from app.server.samplers import Samplers, with_samplers
from app.server.validation import Fields, refuse, shown

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "id_slot",  # llama.cpp's
        "cache_prompt",
    }
)
"""No accounts, nothing stored, and prefix reuse needs no key."""

MAX_CHOICES = 32
"""Of one request: each waits in the engine's queue, and a client has so many places there."""
MAX_COPIED_BYTES = 32 * 1024 * 1024
MAX_INT = 2**31 - 1
_MAX_LOGIT_BIAS = 1024


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _token_biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise refuse(
            "invalid_value",
            "{path} should be an object of biases by token id, got {value}",
            value=shown(value),
        )
    if len(value) > _MAX_LOGIT_BIAS:
        raise refuse(
            "invalid_value",
            "{path} may hold {most} tokens at most, got {count}",
            most=str(_MAX_LOGIT_BIAS),
            count=str(len(value)),
        )
    biases = {}
    for token, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,10}", token) or int(token) > MAX_INT:
            raise refuse(
                "invalid_value",
                "{path} should have token ids for keys, got {value}",
                value=shown(token),
            )
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise refuse(
                "invalid_value",
                "{path} of token {token} should be -100 to 100, got {value}",
                token=token,
                value=shown(bias),
            )
        biases[int(token)] = float(bias)
    return biases


TokenLimit = Annotated[int, Field(ge=1, le=MAX_INT)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
_STOP_STRING = {"type": "string", "minLength": 1}
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(max_length=16),
    WithJsonSchema(
        {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": 16}]}
    ),
]
_BIASES_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": _MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ]
}


class SamplingFields(Fields):
    """How tokens are drawn. Besides OpenAI's fields those of vLLM and llama.cpp, as they call
    them."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    """0 is off, and so is vLLM's -1."""
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    xtc_probability: Fraction | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """llama.cpp's name for repetition_penalty."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        dict[int, float] | None, PlainValidator(_token_biases), WithJsonSchema(_BIASES_SCHEMA)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    samplers: Samplers | None = None
    """llama.cpp's: what is left out is off."""

    @model_validator(mode="after")
    def _one_penalty(self) -> SamplingFields:
        if self.repeat_penalty is not None and self.repetition_penalty is not None:
            raise refuse(
                "invalid_value",
                "{path} is another name of `repetition_penalty`; send one of them",
                field="repeat_penalty",
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """What the request says; the rest is left to the model and the house."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        penalty, samplers = values.pop("repeat_penalty"), values.pop("samplers")
        if penalty is not None:
            values["repetition_penalty"] = penalty
        if values["top_k"] == -1:
            values["top_k"] = 0
        values = with_samplers(values, samplers)
        return Sampling(**{name: value for name, value in values.items() if value is not None})


class StreamOptions(Fields):
    """`stream_options`; no effect unless `stream` is true."""

    # Padding against traffic analysis; nothing leaves this machine.
    without_effect = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class GenerationFields(SamplingFields):
    """What chat completions and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stop: Stop | None = None
    max_tokens: TokenLimit | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def token_limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> GenerationFields:
        most = self.token_limit
        if most is not None and (self.min_tokens or 0) > most:
            raise refuse(
                "invalid_value",
                "{path} should be {most}, the most tokens asked for, or less, got {value}",
                field="min_tokens",
                most=str(most),
                value=str(self.min_tokens),
            )
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


def check_copies(body: bytes, n: int) -> None:
    """Refuse long bodies of which the engine would get too many copies, one for each choice.

    Raises:
        ApiError: 400.
    """
    if n > 1 and n * len(body) > MAX_COPIED_BYTES:
        raise ApiError(
            400,
            "request_too_large",
            f"`n` = {n} and a body of {len(body)} bytes are {n * len(body)} bytes, and "
            f"{MAX_COPIED_BYTES} is the limit. Ask for fewer choices.",
            param="n",
        )


def spread(prompts: Sequence[GenerationRequest], n: int) -> list[GenerationRequest]:
    """`n` requests for each prompt, in OpenAI's order; all ids derive from the first prompt's.

    A seed is the first choice's own, which is thus the answer of a request for one; the others'
    are derived from it, so that they differ from each other and are the same again next time.
    """
    spread_out: list[GenerationRequest] = []
    for prompt in prompts:
        for choice in range(n):
            index = len(spread_out)
            sampling = msgspec.structs.replace(
                prompt.sampling, seed=_seed_of(prompt.sampling.seed, choice)
            )
            id = f"{prompts[0].id}-{index}" if index else prompts[0].id
            spread_out.append(msgspec.structs.replace(prompt, id=id, sampling=sampling))
    return spread_out


def _seed_of(seed: int | None, choice: int) -> int | None:
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
