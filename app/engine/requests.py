"""What a face asks of the engine: a model, and how and from what it is to generate.

The checks are in `app.engine.request_checks`. No MLX here, nor anything that imports it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from app.engine.constraint import Constraint
from app.engine.conversation import Message, Tool


class ModelRef(msgspec.Struct, frozen=True):
    """An installed model: the name people use and the directory that the library resolved it to."""

    name: str
    path: str
    adapter: str = ""
    """The directory of a LoRA adapter made by mlx-lm to put on the model; empty is none."""


class PromptLookup(msgspec.Struct, frozen=True, tag="prompt_lookup"):
    """Draft what followed the last tokens where they came before, in the prompt or the answer."""

    ngram: int = 3
    """How many tokens must be the same; where there is no such place, fewer, down to two. 1 to
    `MAX_LOOKUP_NGRAM`."""
    tokens: int = 7
    """Most tokens drafted at once, 1 to `MAX_DRAFT_TOKENS`."""


class DraftModel(msgspec.Struct, frozen=True, tag="draft_model"):
    """Draft with a smaller model of the same vocabulary, held in memory beside the other."""

    model: ModelRef
    tokens: int = 4
    """Most tokens drafted at once, 1 to `MAX_DRAFT_TOKENS`."""


MAX_LOOKUP_NGRAM = 16
MAX_DRAFT_TOKENS = 16


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen.

    In this order: a constraint, which leaves what it allows; logit_bias; repetition_penalty;
    presence_penalty and frequency_penalty; the ends of sequence that min_tokens and ignore_eos
    forbid; temperature; top_k; typical_p; top_p; min_p; XTC; then one token is drawn from what is
    left. Each filter sees what those before it left, made a distribution again; of equally likely
    tokens top_k and top_p take those of lower id first. This is llama.cpp's order, but temperature
    comes before the filters, as in transformers and vLLM, for which the settings that models
    recommend are chosen.

    None leaves a setting to the model's own generation_config.json, and where that says nothing to
    `HOUSE_SAMPLING`. Settings out of range are refused by `check_request`. Logprobs are those of
    the model, before all of this.
    """

    temperature: float | None = None
    """At most 2. 0 takes the most likely token, after bias and penalties: all the probability is
    on it then, so that no filter changes anything."""
    top_p: float | None = None
    """Smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int | None = None
    """Most likely tokens kept; 0 is off."""
    min_p: float | None = None
    """Drops tokens below this fraction of the most likely one's probability; 0 is off."""
    typical_p: float | None = None
    """Keeps the tokens whose surprise, -log p, is closest to the expected one, up to this much
    probability; 1 is off. Source: Locally Typical Sampling, arXiv:2202.00666."""
    xtc_probability: float | None = None
    """How often the top choices are excluded, so that answers are less predictable; 0 is off.
    Source: text-generation-webui, pull request 6335."""
    xtc_threshold: float | None = None
    """Of the tokens with at least this probability, XTC leaves only the least likely (all that are
    equally so). 0 to 0.5: above it there are never two. A step in which that would take the end of
    the answer or a newline away is left as it is."""
    repetition_penalty: float | None = None
    """Divides positive logits and multiplies negative ones of the tokens in the prompt and in the
    answer so far; 0.1 to 10, 1 is off. Source: CTRL, arXiv:1909.05858, as in transformers."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens in the answer so far; -2 to 2. Source: OpenAI's API."""
    frequency_penalty: float | None = None
    """As presence_penalty, once for each time a token is in the answer so far."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids: -100 to 100, at most `MAX_LOGIT_BIAS` of them."""
    seed: int | None = None
    """Same seed, prompt and model: same tokens, alone or in a batch. None draws one. Where the
    prompt goes on from states that were kept, those may differ in their last bits from states
    computed anew, because the prompt was read in other pieces: enough to decide between two tokens
    that are equally likely up to rounding."""


HOUSE_SAMPLING = Sampling(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    typical_p=1.0,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
)


class ContextFile(msgspec.Struct, frozen=True):
    """A file, or a piece of one, that lies beside the one with the gap."""

    name: str
    text: str


class Infill(msgspec.Struct, frozen=True, kw_only=True):
    """A gap in a text between `GenerationRequest.prompt` and `suffix`."""

    files: list[ContextFile] = []
    """What the model reads first: with its tokens for repositories and files where it has them,
    else as plain text."""
    middle: str = ""
    """How the gap begins; the answer goes on from there."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Ask for text. Exactly one of `messages`, `prompt` and `prompt_tokens` is set."""

    id: str
    model: ModelRef
    messages: list[Message] | None = None
    """Rendered with the model's own chat template."""
    prompt: str | None = None
    """Raw text, given to the model as it is (its BOS token is added, no template)."""
    suffix: str = ""
    """What follows the gap that begins at the end of `prompt`: the answer fills it. Given to the
    model with its own tokens for this; one that has none is refused with "no_infill"."""
    infill: Infill | None = None
    """More on the gap; set, there is one whether `suffix` is empty or not."""
    prompt_tokens: list[int] | None = None
    """Token ids, used as they are."""
    tools: list[Tool] = []
    """What the model may call. Its template must know of tools; it is refused otherwise."""
    tool_choice: str = "auto"
    """"auto" lets the model choose, "none" answers as if there were no tools, "required" makes it
    call one, a tool's name makes it call that one. Made to, it makes exactly one call, after
    reasoning if it is a model that reasons, and says nothing else; the arguments are valid by the
    tool's schema, every keyword of which is enforced or the request refused. max_tokens cuts it
    short as ever: the reason is then "length", and half a call does not come out."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, for example {"enable_thinking": false}."""
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    """None: what is left of the context."""
    min_tokens: int = 0
    """The answer does not end before it has this many tokens: no end-of-sequence token is drawn,
    and a stop string that is complete before is text like any other."""
    ignore_eos: bool = False
    """No end-of-sequence token is ever drawn; stop strings still end the answer."""
    stop: list[str] = []
    """Generation ends before the first of these strings; none of it reaches the text. They are
    looked for in the text alone: one in a tool call or in reasoning ends nothing."""
    logprobs: bool = False
    top_logprobs: int = 0
    """Alternatives reported per token with their logprobs, 0 to 20."""
    speculation: PromptLookup | DraftModel | None = None
    """Guess tokens and have the model check several in one pass. The answer is the same; `Usage`
    says how many guesses were right. A row whose guesses are not ends up without it."""
    constraint: Constraint | None = None
    """What the answer is forced to be; `Constraint` says how that goes with the other fields."""
    client: str = ""
    """Who asks, for fairness: requests of one client wait for each other first, and one client's
    many do not delay another's one. A face names itself ("tui") or, where it speaks for several,
    each of them (a digest of the API key, a remote address): all requests of a REST endpoint come
    over one connection. Empty: the connection. Shown by `gryphon ps`, so no secret."""
    wait_for_model: bool = True
    """False: fail with `model_busy` instead of waiting to swap out a model that is in use."""
    chat: str = ""
    """The chat that the words belong to, an id of the client's choice: what the engine keeps of
    them goes with `ForgetChat`. Empty: what is kept goes by age and size alone."""
    keep_alive_s: float | None = None
    """Seconds the model stays in memory after this request, if no other follows: 0 unloads it at
    once, a negative number or infinity never. None: as GRYPHON_KEEP_ALIVE says."""

    @property
    def fills_gap(self) -> bool:
        """Whether the answer belongs between `prompt` and `suffix`."""
        return bool(self.suffix) or self.infill is not None
