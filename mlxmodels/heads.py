"""A decoder with the head of a task on top: the contract that every port's Model shares.

`model(inputs, cache)` is mlx-lm's contract and what the engine calls. `forward(...)` takes what a
Hugging Face model takes and names what it returns. Losses follow transformers 5.23
`loss/loss_utils.py`, pooling its `modeling_layers.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmodels import losses
from mlxmodels.attention import Call
from mlxmodels.errors import ModelError
from mlxmodels.linear import Linear
from mlxmodels.weights import drop_tied_head, without_buffers

CAUSAL_LM = "causal-lm"
BASE = "base"
SEQUENCE_CLASSIFICATION = "sequence-classification"
TOKEN_CLASSIFICATION = "token-classification"
QUESTION_ANSWERING = "question-answering"

TASKS = (
    CAUSAL_LM,
    BASE,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
)

States = Sequence[Any] | None
"""One state per layer, as `make_cache` returns them; None for a whole sequence at once."""

Spans = tuple[list[int], list[int]]
"""Index of each row's first token, and past its last."""

_HEADS = ("lm_head.", "score.", "qa_outputs.")


@dataclass(frozen=True)
class ModelOutput:
    """What `forward` returns; fields that the task or the call does not have are None."""

    loss: mx.array | None = None
    """Scalar float32, if labels or positions were given."""
    logits: mx.array | None = None
    """[B, T, V] (causal-lm), [B, labels] (sequence) or [B, T, labels] (token classification)."""
    last_hidden_state: mx.array | None = None
    """[B, T, hidden_size] after the final norm."""
    hidden_states: tuple[mx.array, ...] | None = None
    """Input of every layer, then the last hidden state, each [B, T, hidden_size]."""
    attentions: tuple[mx.array, ...] | None = None
    """Weights of every attention layer, [B, H, T, S]; recurrent layers have none."""
    cache: States = None
    """The states given, advanced."""
    start_logits: mx.array | None = None
    """[B, T], question answering."""
    end_logits: mx.array | None = None
    """[B, T], question answering."""


class TaskModel(nn.Module):
    """Base of every port's `Model`.

    Args:
        args: The family's ModelArgs.
        task: One of the class's `tasks`.

    Raises:
        ModelError: the family has no head for the task.
    """

    decoder: ClassVar[Any]
    """The family's bare decoder, called as decoder(inputs, cache, call)."""
    tasks: ClassVar[tuple[str, ...]]
    """What the family's documentation lists."""

    def __init__(self, args: Any, task: str = CAUSAL_LM) -> None:
        super().__init__()
        if task not in self.tasks:
            raise ModelError(
                f"{args.model_type} models have no {task!r} head; known are "
                f"{', '.join(self.tasks)}."
            )
        self.args = args
        self.model_type = args.model_type
        self.task = task
        self.model = self.decoder(args)
        if task == CAUSAL_LM and not args.is_tied:
            self.lm_head = Linear(args.hidden_size, args.vocab_size, bias=False)
        elif task == SEQUENCE_CLASSIFICATION:
            self.score = nn.Linear(args.hidden_size, args.label_count, bias=False)
        elif task == TOKEN_CLASSIFICATION:
            self.score = nn.Linear(args.hidden_size, args.label_count, bias=True)
        elif task == QUESTION_ANSWERING:
            self.qa_outputs = nn.Linear(args.hidden_size, 2)

    def __call__(
        self, inputs: mx.array, cache: States = None, call: Call | None = None
    ) -> mx.array:
        """What the task's head says of every token.

        Args:
            inputs: Token ids, [B, T], integer.
            cache: States from `make_cache`, read and advanced; None for a whole sequence.

        Ids are not checked: one outside the vocabulary reads foreign memory. `forward` checks.

        Returns:
            In the model's dtype: logits of the next token [B, T, V]; last hidden states
            [B, T, hidden_size] of a base model; label logits [B, T, labels]; start and end logits
            [B, T, 2].
        """
        return self._head(self.model(inputs, cache, call))

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: States = None,
        labels: mx.array | None = None,
        start_positions: mx.array | None = None,
        end_positions: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """One forward call under the Hugging Face names.

        Args:
            input_ids: [B, T] integer; or else
            inputs_embeds: [B, T, hidden_size].
            attention_mask: [B, T], zero on padding before and after each row's tokens; a mask that
                also covers what the states hold, [B, past + T], counts from its end. Rows then
                equal the rows alone; what is computed on padding means nothing.
            position_ids: [B or 1, T] integer; without it every row counts from its first token.
                Without mask and states, a position 0 after a row's first token opens a new
                document, independent of those before. (transformers takes any jump for one, and in
                XGLM and Open-Llama none.) With a mask or states there is one document, and
                RecurrentGemma still drops its recurrent state at every position 0.
            cache: States from `make_cache`, read and advanced.
            labels: [B, T] integer, shifted inside (causal-lm) or not (token classification), -100
                ignored; [B] integer or [B, labels] float (sequence classification).
            start_positions, end_positions: [B] integer, ignored outside 0..T-1.

        Raises:
            ValueError: arguments that contradict each other or the task.
        """
        B, T = self._check_tokens(input_ids, inputs_embeds)
        self._check_labels(labels, start_positions, end_positions)
        self._check_cache(cache)
        call = Call(
            hidden_states=[] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
        )
        if inputs_embeds is not None:
            call.inputs_embeds = inputs_embeds.astype(self.dtype)
        if position_ids is not None:
            if position_ids.shape not in ((B, T), (1, T)) or not mx.issubdtype(
                position_ids.dtype, mx.integer
            ):
                raise ValueError(
                    f"[forward] expected position_ids [{B}, {T}] integer, "
                    f"got {position_ids.shape} of {position_ids.dtype}."
                )
            low, high = int(position_ids.min()), int(position_ids.max())
            if low < 0 or high >= 2**31:
                raise ValueError(f"[forward] expected position_ids from 0, got {low} to {high}.")
            call.position_ids = mx.broadcast_to(position_ids, (B, T))
            if attention_mask is None and cache is None:
                call.documents = _documents(call.position_ids)
        past = max(cache[0].offsets) if cache else 0
        spans = None if attention_mask is None else _token_spans(attention_mask, B, T, past)
        is_padded = spans is not None and spans != ([0] * B, [T] * B)
        if is_padded and self.bidirectional:
            assert attention_mask is not None
            call.valid = attention_mask[:, -T:] != 0
        hidden = self._decoded(input_ids, cache, call, spans if is_padded else None)
        out = self._head(hidden)
        if self.task == SEQUENCE_CLASSIFICATION:
            out = out[mx.arange(B), self._last_tokens(input_ids, spans, B, T)]
        is_span = self.task == QUESTION_ANSWERING
        return ModelOutput(
            loss=self._loss(out, labels, start_positions, end_positions),
            logits=None if is_span or self.task == BASE else out,
            last_hidden_state=hidden,
            hidden_states=None if call.hidden_states is None else tuple(call.hidden_states),
            attentions=None if call.attentions is None else tuple(call.attentions),
            cache=cache,
            start_logits=out[..., 0] if is_span else None,
            end_logits=out[..., 1] if is_span else None,
        )

    def logits(self, hidden: mx.array) -> mx.array:
        """Next-token logits [B, T, V] of last hidden states."""
        if self.args.is_tied:
            out: mx.array = self.model.embed_tokens.as_linear(hidden)
            return out
        return self.lm_head(hidden)

    @property
    def dtype(self) -> mx.Dtype:
        """Of the hidden states: that of the norms, which quantization leaves alone."""
        weights: list[tuple[str, mx.array]] = tree_flatten(self.layers[0].parameters())  # type: ignore[assignment]
        return next(weight.dtype for _, weight in weights if weight.ndim == 1)

    @property
    def bidirectional(self) -> bool:
        """Whether tokens see later ones; then nothing can be continued and there are no states."""
        return False

    @property
    def layers(self) -> list[Any]:
        """The decoder's layers, where mlx-lm's quantizer and LoRA trainer look for them."""
        layers: list[Any] = self.model.layers
        return layers

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Which layers mlx-lm's quantizer may pack: heads of a few labels stay as they are."""
        return lambda path, module: not path.startswith(("score", "qa_outputs"))

    def make_cache(self) -> list[Any]:
        """Empty state of one sequence, or of a batch: it takes the size of the first input.

        Raises:
            ModelError: the model is bidirectional.
        """
        if self.bidirectional:
            raise ModelError(
                "config.json sets use_bidirectional_attention: such a model reads whole texts and "
                "cannot generate; call it without a cache."
            )
        return self.new_states()

    def new_states(self) -> list[Any]:
        """One empty state per layer."""
        raise NotImplementedError

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoint tensors under this module's names and layouts."""
        weights = without_buffers(_with_model_prefix(weights))
        if self.task == CAUSAL_LM:
            return drop_tied_head(weights) if self.args.is_tied else weights
        # A head is no part of a base model, and another task's no part of a classifier.
        dropped = _HEADS if self.task == BASE else ("lm_head.",)
        weights = {name: v for name, v in weights.items() if not name.startswith(dropped)}
        return weights

    def _head(self, hidden: mx.array) -> mx.array:
        if self.task == CAUSAL_LM:
            return self.logits(hidden)
        if self.task == QUESTION_ANSWERING:
            return self.qa_outputs(hidden)
        return hidden if self.task == BASE else self.score(hidden)

    def _check_cache(self, cache: States) -> None:
        if cache is None:
            return
        if self.bidirectional:
            raise ValueError("[forward] a bidirectional model keeps no states.")
        want = [type(state).__name__ for state in self.new_states()]
        got = [type(state).__name__ for state in cache]
        if want != got:
            raise ValueError(
                f"[forward] expected the states of make_cache(), {_counted(want)}, "
                f"got {_counted(got)}."
            )

    def _check_tokens(
        self, input_ids: mx.array | None, inputs_embeds: mx.array | None
    ) -> tuple[int, int]:
        """Rows and tokens; an id outside the vocabulary would read foreign memory."""
        for name, value in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
            if not isinstance(value, mx.array | None):
                kind = type(value).__name__
                raise ValueError(f"[forward] expected {name} as an mlx array, got a {kind}.")
        width, vocabulary = self.args.hidden_size, self.args.vocab_size
        if inputs_embeds is not None and input_ids is None:
            if inputs_embeds.ndim == 3 and inputs_embeds.shape[2] == width and inputs_embeds.size:
                return inputs_embeds.shape[0], inputs_embeds.shape[1]
            raise ValueError(
                f"[forward] expected inputs_embeds [B, T, {width}], got {inputs_embeds.shape}."
            )
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("[forward] expected either input_ids or inputs_embeds.")
        if input_ids.ndim != 2 or not input_ids.size:
            raise ValueError(f"[forward] expected input_ids [B, T], got {input_ids.shape}.")
        if not mx.issubdtype(input_ids.dtype, mx.integer):
            raise ValueError(f"[forward] expected integer input_ids, got {input_ids.dtype}.")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"[forward] expected input_ids from 0 to {vocabulary - 1}, got {low} to {high}."
            )
        return input_ids.shape[0], input_ids.shape[1]

    def _check_labels(
        self, labels: mx.array | None, start: mx.array | None, end: mx.array | None
    ) -> None:
        if labels is not None and self.task in (BASE, QUESTION_ANSWERING):
            raise ValueError(f"[forward] a {self.task} model takes no labels.")
        if (start is None) != (end is None):
            raise ValueError("[forward] expected both start_positions and end_positions.")
        if start is not None and self.task != QUESTION_ANSWERING:
            raise ValueError(f"[forward] a {self.task} model takes no start or end positions.")

    def _loss(
        self,
        out: mx.array,
        labels: mx.array | None,
        start: mx.array | None,
        end: mx.array | None,
    ) -> mx.array | None:
        if start is not None and end is not None:
            return losses.span(out[..., 0], out[..., 1], start, end)
        if labels is None:
            return None
        if self.task == CAUSAL_LM:
            return losses.next_token(out, labels)
        if self.task == SEQUENCE_CLASSIFICATION:
            return losses.sequence(out, labels, self.args.problem_type)
        return losses.cross_entropy(out, labels)

    def _decoded(
        self, input_ids: mx.array | None, cache: States, call: Call, padding: Spans | None
    ) -> mx.array:
        """Last hidden states; padding goes through states, which know how to leave it out."""
        if padding is None or self.bidirectional:
            states = cache
        else:
            states = self.make_cache() if cache is None else cache
        before = [state.state for state in states or ()]
        try:
            if padding is not None:
                for state in states or ():
                    left = padding[0] if any(padding[0]) else None
                    state.prepare(left_padding=left, lengths=padding[1])
            hidden: mx.array = self.model(input_ids, states, call)
            if padding is not None:
                for state in states or ():
                    state.finalize()
        except Exception:
            for state, was in zip(states or (), before, strict=True):
                state.state = was  # a call that failed was none
            raise
        return hidden

    def _last_tokens(
        self, input_ids: mx.array | None, spans: Spans | None, B: int, T: int
    ) -> mx.array:
        """Index of each row's last token, [B]: by the mask, else the last id that is not padding.

        Raises:
            ValueError: several rows without mask or pad token.
        """
        if spans is not None:
            return mx.array(spans[1]) - 1
        pad = self.args.pad_token_id
        if pad is None and B > 1:
            raise ValueError(
                "[forward] config.json names no pad_token_id, so the last token of several rows "
                "is not known; pass attention_mask."
            )
        if pad is None or input_ids is None:
            return mx.full((B,), T - 1, dtype=mx.int32)
        return mx.argmax(mx.where(input_ids != pad, mx.arange(T), -1), axis=-1)


def _documents(position_ids: mx.array) -> mx.array | None:
    """Number of the packed document of every token, [B, T]; None if there is one per row."""
    breaks = position_ids[:, 1:] == 0
    if not breaks.any().item():
        return None
    return mx.pad(mx.cumsum(breaks.astype(mx.int32), axis=1), [(0, 0), (1, 0)])


def _counted(names: list[str]) -> str:
    kinds = Counter(names)
    return " and ".join(f"{count} {name}" for name, count in kinds.items()) or "none"


def _token_spans(attention_mask: mx.array, B: int, T: int, past: int) -> Spans:
    """Where each row's tokens begin and end.

    Raises:
        ValueError: wrong shape, a row without tokens, or padding between tokens.
    """
    if attention_mask.shape not in ((B, T), (B, past + T)) and not (
        past and attention_mask.ndim == 2 and attention_mask.shape[1] > past + T
    ):
        raise ValueError(
            f"[forward] expected attention_mask [{B}, {T}], got {attention_mask.shape}."
        )
    rows: list[list[bool]] = (attention_mask[:, -T:] != 0).tolist()  # type: ignore[assignment]
    begins, ends = [], []
    for i, row in enumerate(rows):
        if True not in row:
            raise ValueError(f"[forward] row {i} of attention_mask has no token.")
        begins.append(row.index(True))
        ends.append(T - row[::-1].index(True))
        if not all(row[begins[-1] : ends[-1]]):
            raise ValueError(f"[forward] row {i} of attention_mask has padding between tokens.")
    return begins, ends


def _with_model_prefix(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Bare decoders come without a prefix, question answering with another; all get `model.`."""
    if "embed_tokens.weight" in weights:
        return {
            name if name.startswith(_HEADS) else f"model.{name}": value
            for name, value in weights.items()
        }
    return {
        f"model.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name: v
        for name, v in weights.items()
    }
