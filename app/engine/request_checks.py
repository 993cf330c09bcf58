"""Which requests no model could answer, whatever it is: refused before anything is prepared.

No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from app.engine.constraint import check_constraint
from app.engine.conversation import check_messages, check_options, check_tools
from app.engine.requests import (
    MAX_DRAFT_TOKENS,
    MAX_LOOKUP_NGRAM,
    DraftModel,
    GenerationRequest,
    Infill,
    ModelRef,
    PromptLookup,
    Sampling,
)
from app.errors import GryphonError

MAX_REQUEST_ID = 200
MAX_MODEL_NAME = 1000
MAX_PATH = 4096
MAX_STOP_STRINGS = 16
# Text is compared with their beginnings at every token.
MAX_STOP_CHARACTERS = 1024
MAX_CLIENT_CHARACTERS = 200
MAX_CHAT_ID = 200
# OpenAI documents no limit; this is more than clients send and cheap to add at every step.
MAX_LOGIT_BIAS = 1024
MAX_INT32 = 2**31 - 1
MAX_TOP_LOGPROBS = 20
MAX_CONTEXT_FILES = 256


def check_request(request: GenerationRequest) -> None:
    """Refuse what no model could answer.

    Raises:
        GryphonError: "invalid_request", "invalid_sampling" or "invalid_constraint", naming the
            field, what it may be and what it is.
    """
    given = [request.messages, request.prompt, request.prompt_tokens]
    if sum(part is not None for part in given) != 1:
        raise GryphonError(
            "invalid_request", "Give exactly one of messages, prompt and prompt_tokens."
        )
    if request.messages is not None and not request.messages:
        raise GryphonError("invalid_request", "messages is empty: give at least one message.")
    if request.prompt_tokens is not None and not request.prompt_tokens:
        raise GryphonError("invalid_request", "prompt_tokens is empty: give at least one token.")
    if request.prompt is None and (request.suffix or request.infill is not None):
        raise GryphonError(
            "invalid_request", "suffix and infill are for a gap after a prompt: give prompt."
        )
    if request.infill is not None:
        check_infill(request.infill)
    if request.messages is None and (request.tools or request.template_options):
        raise GryphonError(
            "invalid_request",
            "tools and template_options are for the chat template: give messages, not a prompt.",
        )
    check_model(request.model)
    check_messages(request.messages or [])
    check_tools(request.tools, request.tool_choice)
    check_options(request.template_options)
    if request.max_tokens is not None and not 1 <= request.max_tokens <= MAX_INT32:
        raise GryphonError(
            "invalid_request",
            f"max_tokens must be 1 to {MAX_INT32}, got {request.max_tokens}.",
        )
    most = MAX_INT32 if request.max_tokens is None else request.max_tokens
    if not 0 <= request.min_tokens <= most:
        raise GryphonError(
            "invalid_request",
            f"min_tokens must be 0 to {most}"
            f"{'' if request.max_tokens is None else ', which is max_tokens'}, "
            f"got {request.min_tokens}.",
        )
    if len(request.stop) > MAX_STOP_STRINGS:
        raise GryphonError(
            "invalid_request",
            f"stop may hold {MAX_STOP_STRINGS} strings at most, got {len(request.stop)}.",
        )
    if "" in request.stop:
        raise GryphonError("invalid_request", "stop holds an empty string, which ends everything.")
    if (longest := max(map(len, request.stop), default=0)) > MAX_STOP_CHARACTERS:
        raise GryphonError(
            "invalid_request",
            f"A stop string may have {MAX_STOP_CHARACTERS} characters at most, got {longest}.",
        )
    check_client(request.client)
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise GryphonError(
            "invalid_request",
            f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}, got {request.top_logprobs}.",
        )
    if request.constraint is not None:
        check_constraint(request.constraint)
    check_chat(request.chat)
    check_keep_alive(request.keep_alive_s)
    check_sampling(request.sampling)
    _check_speculation(request.speculation)
    _check_alone(request)


def _check_alone(request: GenerationRequest) -> None:
    """A constraint holds the whole answer to its form, one token at a time; so does tool_choice."""
    tools = request.tools if request.tool_choice != "none" else []
    if request.tool_choice not in ("auto", "none") and request.speculation:
        raise GryphonError(
            "invalid_request",
            f"tool_choice {request.tool_choice!r} and speculation cannot be combined: leave one of "
            "them out.",
        )
    for name, other in (("speculation", request.speculation), ("tools", tools)):
        if request.constraint is not None and other:
            raise GryphonError(
                "invalid_request",
                f"constraint and {name} cannot be combined: leave one of them out.",
            )


def _check_speculation(speculation: PromptLookup | DraftModel | None) -> None:
    if speculation is None:
        return
    if isinstance(speculation, DraftModel):
        check_model(speculation.model)
    bounds = {"tokens": (speculation.tokens, MAX_DRAFT_TOKENS)}
    if isinstance(speculation, PromptLookup):
        bounds["ngram"] = (speculation.ngram, MAX_LOOKUP_NGRAM)
    for name, (value, most) in bounds.items():
        if not 1 <= value <= most:
            raise GryphonError(
                "invalid_request", f"speculation.{name} must be 1 to {most}, got {value}."
            )


def check_model(model: ModelRef) -> None:
    """Refuse what names no model.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(model.name) > MAX_MODEL_NAME:
        raise GryphonError(
            "invalid_request",
            f"A model's name may have {MAX_MODEL_NAME} characters at most, got {len(model.name)}.",
        )
    for path in (model.path, model.adapter):
        if len(path) > MAX_PATH or "\0" in path:
            raise GryphonError(
                "invalid_request",
                f"A model's directory must be a path of {MAX_PATH} characters at most, without "
                "zero bytes.",
            )


def check_chat(chat: str) -> None:
    """Refuse the id of a chat that is no id.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(chat) > MAX_CHAT_ID:
        raise GryphonError(
            "invalid_request",
            f"chat may have {MAX_CHAT_ID} characters at most, got {len(chat)}.",
        )


_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings out of range.

    Raises:
        GryphonError: "invalid_sampling", naming the field, its range and what it is.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise GryphonError(
                "invalid_sampling", f"{name} must be {low:g} to {high:g}, got {value:g}."
            )
    if sampling.top_k is not None and not 0 <= sampling.top_k <= MAX_INT32:
        raise GryphonError(
            "invalid_sampling", f"top_k must be 0 (off) to {MAX_INT32}, got {sampling.top_k}."
        )
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise GryphonError(
            "invalid_sampling", f"seed must be a 64-bit whole number, got {sampling.seed}."
        )
    _check_logit_bias(sampling.logit_bias or {})


def _check_logit_bias(bias: Mapping[int, float]) -> None:
    if len(bias) > MAX_LOGIT_BIAS:
        raise GryphonError(
            "invalid_sampling",
            f"logit_bias may hold {MAX_LOGIT_BIAS} tokens at most, got {len(bias)}.",
        )
    for token_id, value in bias.items():
        if not 0 <= token_id <= MAX_INT32:
            raise GryphonError(
                "invalid_sampling",
                f"logit_bias must be for token ids of 0 to {MAX_INT32}, got {token_id}.",
            )
        if not -100.0 <= value <= 100.0:
            raise GryphonError(
                "invalid_sampling",
                f"logit_bias of token {token_id} must be -100 to 100, got {value:g}.",
            )


def check_client(client: str) -> None:
    """Refuse the name of a client that is none.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(client) > MAX_CLIENT_CHARACTERS:
        raise GryphonError(
            "invalid_request",
            f"client may have {MAX_CLIENT_CHARACTERS} characters at most, got {len(client)}.",
        )


def check_infill(infill: Infill) -> None:
    """Refuse more files, or longer names, than anybody has beside a gap.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(infill.files) > MAX_CONTEXT_FILES:
        raise GryphonError(
            "invalid_request",
            f"infill may hold {MAX_CONTEXT_FILES} files at most, got {len(infill.files)}.",
        )
    if (longest := max((len(file.name) for file in infill.files), default=0)) > MAX_PATH:
        raise GryphonError(
            "invalid_request",
            f"A file's name may have {MAX_PATH} characters at most, got {longest}.",
        )


def check_keep_alive(seconds: float | None) -> None:
    """Refuse what is no time.

    Raises:
        GryphonError: "invalid_request".
    """
    if seconds is not None and math.isnan(seconds):
        raise GryphonError("invalid_request", "keep_alive_s must be a number of seconds, got nan.")
