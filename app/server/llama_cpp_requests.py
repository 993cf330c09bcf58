"""What llama.cpp's routes take, field by field.

| Field of `/infill` | |
|---|---|
| model | honoured; without it the resident model, else the default one |
| input_prefix, input_suffix, prompt (how the gap begins), input_extra (text, filename) | honoured |
| n_predict (−1: to the end; 0: the prompt is read and kept, nothing is answered), n_cmpl (≤ 8) | honoured |
| stream, stop (≤ 16), response_fields, return_tokens | honoured |
| temperature (≤ 2), top_k, top_p, min_p, typical_p, xtc_probability, xtc_threshold, repeat_penalty, presence_penalty, frequency_penalty, logit_bias (of token ids), seed, ignore_eos | honoured |
| samplers | which there are is honoured, those left out are off; the order is the engine's own |
| n_indent, t_max_predict_ms | honoured: the answer ends early, as in llama.cpp |
| id_slot, cache_prompt, n_cache_reuse, t_max_prompt_ms, n_keep, n_discard, sse_ping_interval, `time` in input_extra | no effect |
| dynatemp_range = 0, mirostat = 0, dry_multiplier = 0, top_n_sigma = −1, n_probs = 0, min_keep = 0, post_sampling_probs = false, timings_per_token = false, return_progress = false, grammar = "", json_schema = null, lora = [] | neutral only |
| dynatemp_exponent, mirostat_tau, mirostat_eta, dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers | no effect: what they belong to is off |
| repeat_last_n | −1; anything where no penalty is asked for |
| anything else | unknown |

"Neutral only" and "unknown" are refused with 400. "No effect" can change no answer here: reuse of
prompts needs no slot and no permission, and a prompt that does not fit is refused, never shortened.
`infill` among the samplers: `app.server.samplers`. Without `temperature` and the like the model's
own recommendation holds.

`/tokenize`: content (text), add_special, parse_special, with_pieces, model. `/detokenize`: tokens,
model. `/props`: model in the query; autoload without effect.
"""  # noqa: E501

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from app.engine.protocol import ContextFile, Infill, Sampling
from app.engine.request_checks import MAX_CONTEXT_FILES, MAX_LOGIT_BIAS, MAX_PATH
from app.engine.token_commands import MAX_TOKENS
from app.server.samplers import Samplers, with_samplers
from app.server.validation import Fields, refuse, shown

_MAX_INT = 2**31 - 1
Text = Annotated[str, Field(max_length=16 * 1024 * 1024)]
ModelName = Annotated[str, Field(max_length=256)]


class _Fields(Fields):
    """Null is as good as nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        required = schema.get("required", [])
        schema["properties"] = {
            name: one if name in required else {"anyOf": [one, {"type": "null"}]}
            for name, one in schema.get("properties", {}).items()
        }
        return schema


class ExtraFile(_Fields):
    """One of `input_extra`."""

    without_effect = frozenset({"time"})  # when llama.vim read it

    text: Text
    filename: Annotated[str, Field(max_length=MAX_PATH)] | None = None


def _bias(value: Any) -> dict[int, float]:
    """[[id, bias], …] or {"id": bias, …}; false for a token that is never to come."""
    pairs = [*value.items()] if isinstance(value, dict) else value
    if not isinstance(pairs, list) or len(pairs) > MAX_LOGIT_BIAS:
        raise refuse(
            "invalid_value", f"{{path}} should be a list of {MAX_LOGIT_BIAS} [id, bias] at most"
        )
    biases: dict[int, float] = {}
    for pair in pairs:
        id: Any = None
        bias: Any = None
        if isinstance(pair, list | tuple) and len(pair) == 2:
            id, bias = pair
        if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 11:
            id = int(id)
        bias = -100.0 if bias is False else bias
        in_range = type(bias) in (int, float) and -100 <= bias <= 100
        if type(id) is not int or not 0 <= id <= _MAX_INT or not in_range:
            raise refuse(
                "invalid_value",
                "{path} should hold pairs of a token id and a bias of -100 to 100 or false, "
                "got {value}",
                value=shown(pair),
            )
        biases[id] = float(bias)
    return biases


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Probability = Annotated[float, Field(ge=0, le=1)]


class InfillFields(_Fields):
    """Body of `POST /infill`."""

    without_effect = frozenset(
        {"id_slot", "cache_prompt", "n_cache_reuse", "t_max_prompt_ms", "n_keep", "n_discard"}
        | {"sse_ping_interval", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "dry_base"}
        | {"dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"}
    )
    only_neutral = {
        "dynatemp_range": (0, 0.0),
        "mirostat": (0,),
        "dry_multiplier": (0, 0.0),
        "top_n_sigma": (-1, -1.0),
        "n_probs": (0,),
        "min_keep": (0,),
        "post_sampling_probs": (False,),
        "timings_per_token": (False,),
        "return_progress": (False,),
        "grammar": ("",),
        "json_schema": (),
        "lora": ([],),
    }

    model: ModelName | None = None
    input_prefix: Text = ""
    input_suffix: Text = ""
    prompt: Text = ""
    input_extra: Annotated[list[ExtraFile], Field(max_length=MAX_CONTEXT_FILES)] | None = None
    n_predict: Annotated[int, Field(ge=-1, le=_MAX_INT)] = -1
    n_cmpl: Annotated[int, Field(ge=1, le=8)] = 1
    n_indent: Annotated[int, Field(ge=0, le=_MAX_INT)] = 0
    t_max_predict_ms: Annotated[int, Field(ge=0, le=_MAX_INT)] = 0
    stream: bool = False
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            BeforeValidator(_as_list),
            Field(max_length=16),
        ]
        | None
    ) = None
    response_fields: Annotated[list[str], Field(max_length=100)] | None = None
    return_tokens: bool = False
    temperature: Annotated[float, Field(le=2)] | None = None
    top_k: Annotated[int, Field(le=_MAX_INT)] | None = None
    top_p: _Probability | None = None
    min_p: _Probability | None = None
    typical_p: _Probability | None = None
    xtc_probability: _Probability | None = None
    xtc_threshold: _Probability | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=_MAX_INT)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        PlainValidator(lambda value: None if value is None else _bias(value)),
        WithJsonSchema({"type": "array", "maxItems": MAX_LOGIT_BIAS}),
    ] = None
    seed: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    ignore_eos: bool = False
    samplers: Samplers | None = None

    @model_validator(mode="after")
    def _penalties_see_everything(self) -> InfillFields:
        penalties = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty)
        has_penalty = any(value not in (None, neutral) for value, neutral in
                          zip(penalties, (1, 0, 0), strict=True))  # fmt: skip
        if has_penalty and self.repeat_last_n not in (None, -1):
            raise refuse(
                "unsupported_parameter",
                "{path} = {value} is not supported: penalties look at all of the prompt and of the "
                "answer (-1); leave the field out",
                field="repeat_last_n",
                value=shown(self.repeat_last_n),
            )
        return self

    @property
    def infill(self) -> Infill:
        """The gap's surroundings."""
        files = [ContextFile(one.filename or "file", one.text) for one in self.input_extra or []]
        return Infill(files=files, middle=self.prompt)

    @property
    def sampling(self) -> Sampling:
        """What the request says, and what the samplers that it leaves out leave off."""
        given: dict[str, Any] = {
            "temperature": None if self.temperature is None else max(0.0, self.temperature),
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "xtc_probability": self.xtc_probability,
            "xtc_threshold": self.xtc_threshold,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            # As in llama.cpp, which takes the largest number of 32 bits for random, too.
            "seed": None if self.seed in (-1, 2**32 - 1) else self.seed,
        }
        if self.xtc_threshold is not None and self.xtc_threshold > 0.5:
            given |= {"xtc_probability": 0.0, "xtc_threshold": None}  # there is nothing to exclude
        given = with_samplers(given, self.samplers)
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class TokenizeFields(_Fields):
    """Body of `POST /tokenize`."""

    model: ModelName | None = None
    content: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeFields(_Fields):
    """Body of `POST /detokenize`."""

    model: ModelName | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=_MAX_INT)]],
        Field(max_length=MAX_TOKENS, fail_fast=True),
    ]
