"""Speculative decoding: a row in a lane of its own, which gets several tokens from one pass.

A guess at the next tokens (`app.engine.drafting`) is fed together with the last known token, and at
every position the row's own sampler draws from the model's logits, with the numbers that it would
draw with one token at a time. Drawn tokens are the answer up to the first that differs from the
guess, that one included: so the answer is the same as without guesses, seeded or greedy, with
penalties or without. (A product of several rows may differ from that of one in its last bits, as in
a batch.) What the states have read beyond is taken back (`app.engine.rollback`). Where that means
going back to before the pass, the tokens are fed again with those of the next one.

A lane adapts: a wrong guess makes the next one shorter, a right one longer. If few are right, or
there is nothing to guess for long, the row joins the batch for the rest of its answer.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx

from app.engine import memory
from app.engine.batch import Launch, Row
from app.engine.drafting import Drafter, LookupDrafter, ModelDrafter, check_same_vocabulary
from app.engine.memory import MemoryBudget
from app.engine.penalties import Penalties
from app.engine.preparation import shared_length
from app.engine.protocol import DraftModel, ModelRef, PromptLookup
from app.engine.resident import ResidentModel, load_resident, plan_resident
from app.engine.rollback import Checkpoint, trimmed
from app.engine.sampling import BatchSampling, RowSampling, sample
from app.engine.state_leaves import can_keep
from app.errors import GryphonError

# Of guesses of one token each, fewer than a quarter right do not pay for the wider passes.
_GUESSES = 16
_FEWEST_RIGHT = 4
# A pass without a guess costs a few per cent more in a lane than in the batch.
_PASSES_WITHOUT = 64
# Beyond this many known tokens to feed again, a pass is without guesses so that it is final.
_MAX_UNREAD = 16

Deliver = Callable[[Row, int, Launch, int], None]
"""Takes a row's next token, and where its logprobs are."""


class Lane:
    """One row that speculates, from its admission on."""

    def __init__(self, row: Row, resident: ResidentModel, drafter: Drafter, tokens: int) -> None:
        self.row = row
        self.is_over = False
        """Whether the row is to join the batch; its states are then as the batch wants them."""
        self._model = resident.loaded.model
        self._drafter = drafter
        self._most = self._length = tokens
        self._guesses: deque[int] = deque(maxlen=_GUESSES)  # tokens right in the last ones
        self._passes_without = 0
        self._penalties = Penalties()
        self._settings: dict[int, BatchSampling] = {}
        self._position = 0

    # What the penalties ask of a row. A position of a guess is as if all before were right.

    @property
    def prompt(self) -> list[int]:
        return self.row.prompt

    @property
    def answer(self) -> list[int]:
        return self.row.answer

    @property
    def launched(self) -> int:
        return len(self.row.answer) + self._position

    @property
    def sampling(self) -> RowSampling:
        assert self.row.sampling is not None
        return self.row.sampling

    @property
    def nbytes(self) -> int:
        """Bytes of the row's states and of its drafter's."""
        states = sum(int(cache.nbytes) for cache in self.row.caches)
        return states + self._drafter.nbytes + self._penalties.nbytes

    def read_prompt(self, room: int) -> bool:
        """Let the drafter read on in the prompt; whether it has read all of it."""
        return self._drafter.read(self.row.prompt, room)

    def step(self, deliver: Deliver) -> None:
        """One pass: at least one token, delivered in order until the row is done."""
        row = self.row
        known = row.prompt + row.answer
        read = row.processed + row.launched
        numbers, uniforms, exclude_top = self._numbers(self._guess_length(len(known) - read))
        guess = self._drafter.draft(known, uniforms[:-1], exclude_top[:-1])
        fed, count = known[read:] + guess, len(guess) + 1
        before = Checkpoint(row.caches) if guess else None
        logits = self._model(mx.array([fed], mx.int32), cache=row.caches)[0, -count:]
        tokens = self._drawn(logits, uniforms[:count], exclude_top[:count])
        launch = Launch.of([row] * count, logits, tokens)
        launch.start()
        drawn = launch.token_ids()
        row.first_token_s = row.first_token_s or time.monotonic()
        right = shared_length(guess, drawn)
        row.drafted += len(guess)
        taken = 0
        while taken <= right and not row.done:
            row.accepted += taken < right  # before a token that may be the last is told
            deliver(row, drawn[taken], launch, taken)
            taken += 1
        assert row.generator is not None
        row.generator.take_back(numbers[taken * len(numbers) // len(uniforms) :])
        if self.sampling.has_penalty:
            for token in drawn[:taken]:
                self._penalties.count(mx.array([token], mx.int32))
        surplus = count - taken
        if before is None or not surplus or trimmed(row.caches, surplus):
            row.launched += len(fed) - surplus
        else:
            row.caches = before.back(row.caches, len(fed))
        self._adapt(len(guess), right)

    def _guess_length(self, unread: int) -> int:
        """How many tokens to guess; never beyond the answer's last."""
        if unread > _MAX_UNREAD or self._gives_up:
            return 0
        return min(self._length, self.row.max_tokens - self.row.generated - 1)

    def _numbers(self, length: int) -> tuple[list[float], list[float], list[bool]]:
        """What the next `length` + 1 tokens are drawn with, in the order of the row's generator:
        all of it, and per token the uniform and whether XTC applies."""
        assert self.row.generator is not None
        chance = self.sampling.xtc_probability
        each = 2 if chance > 0 else 1
        numbers = [self.row.generator.uniform() for _ in range(each * (length + 1))]
        coins = numbers[1::2] if chance > 0 else [1.0] * (length + 1)
        return numbers, numbers[::each], [coin < chance for coin in coins]

    def _drawn(self, logits: mx.array, uniforms: list[float], exclude_top: list[bool]) -> mx.array:
        """The token drawn at each position, [T] int32, from logits [T, V]."""
        settings = self.sampling
        is_changed = settings.has_penalty or settings.logit_bias
        if not is_changed and self.launched >= settings.min_tokens:
            return sample(logits, self._settings_of(len(uniforms)), uniforms, exclude_top)
        if not self.row.answer:
            self._penalties.follow([self], logits.shape[-1])
        penalties = copy.copy(self._penalties)  # of its own: counting replaces what it holds
        tokens = []
        for position in range(len(uniforms)):
            self._position = position
            at = slice(position, position + 1)
            changed = penalties.apply(logits[at])
            tokens.append(sample(changed, self._settings_of(1), uniforms[at], exclude_top[at]))
            penalties.count(tokens[-1])
        self._position = 0
        return mx.concatenate(tokens)

    def _settings_of(self, count: int) -> BatchSampling:
        if count not in self._settings:
            self._settings[count] = BatchSampling.of([self.sampling] * count)
        return self._settings[count]

    @property
    def _gives_up(self) -> bool:
        is_wrong = len(self._guesses) == _GUESSES and sum(self._guesses) < _FEWEST_RIGHT
        return is_wrong or self._passes_without >= _PASSES_WITHOUT

    def _adapt(self, guessed: int, right: int) -> None:
        if not guessed:
            self._passes_without += 1
            self.is_over = self._gives_up
            return
        self._passes_without = 0
        self._guesses.append(right)
        self._length = min(self._most, 2 * self._length) if right == guessed else right + 1


class Lanes:
    """The rows that speculate, taking turns, and the draft model held for them."""

    def __init__(self) -> None:
        self._lanes: deque[Lane] = deque()
        self.draft: ResidentModel | None = None

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def rows(self) -> list[Row]:
        return [lane.row for lane in self._lanes]

    @property
    def state_bytes(self) -> int:
        return sum(lane.nbytes for lane in self._lanes)

    @property
    def weight_bytes(self) -> int:
        return self.draft.loaded.nbytes if self.draft is not None else 0

    def missing_draft(self, row: Row) -> ModelRef | None:
        """The draft model that a row asks for and that is not in memory."""
        speculation = row.speculation
        if not isinstance(speculation, DraftModel):
            return None
        is_here = self.draft is not None and self.draft.ref == speculation.model
        return None if is_here else speculation.model

    def load_draft(
        self,
        ref: ModelRef,
        target: ResidentModel,
        budget: MemoryBudget,
        make_way: Callable[[int], None],
        progress: Callable[[int, int], None],
    ) -> None:
        """Bring a draft model into memory beside the other, in place of the one before.

        Args:
            make_way: Called with the bytes that loading it takes, once it is known to fit.
            progress: Called with bytes done and bytes in all.

        Raises:
            GryphonError: it does not fit, cannot be loaded, or has another vocabulary.
        """
        check_same_vocabulary(target, ref)
        self.draft = None
        memory.release()
        plan = plan_resident(ref, budget, beside_bytes=target.loaded.nbytes)
        make_way(plan.footprint.least_bytes)
        draft = load_resident(ref, plan, progress)
        _check_rollback(draft)
        self.draft = draft

    def open(self, row: Row, resident: ResidentModel) -> None:
        """Give a row that asks for speculation its lane."""
        speculation = row.generation.speculation
        if speculation is None:
            return
        assert row.sampling is not None
        drafter: Drafter
        if isinstance(speculation, PromptLookup):
            drafter = LookupDrafter(speculation.ngram)
        else:
            assert self.draft is not None
            drafter = ModelDrafter(self.draft, resident.vocab_size, row.sampling)
        row.lane = Lane(row, resident, drafter, speculation.tokens)

    def enter(self, lane: Lane) -> None:
        """A prefilled row begins to decode."""
        self._lanes.append(lane)

    def next(self) -> Lane:
        """The lane whose turn it is."""
        self._lanes.rotate(-1)
        return self.latest

    @property
    def latest(self) -> Lane:
        """The lane whose turn it was last; nothing has entered or left since."""
        return self._lanes[-1]

    def leave(self) -> list[Row]:
        """Take out the rows that have ended or go on without speculation."""
        gone = [lane for lane in self._lanes if lane.is_over or lane.row.done]
        for lane in gone:
            self._lanes.remove(lane)
            lane.row.lane = None
        return [lane.row for lane in gone]


def check_speculation(row: Row, resident: ResidentModel) -> None:
    """Refuse to speculate with a model whose states have no way back.

    Raises:
        GryphonError: "invalid_request", naming the model.
    """
    if row.generation.speculation is not None:
        _check_rollback(resident)


def _check_rollback(resident: ResidentModel) -> None:
    # A rotary base that depends on the length is another one for every position of a guess.
    by_length = getattr(resident.loaded.model, "rotates_by_length", False)
    if by_length or not can_keep(resident.loaded.make_cache()):
        why = (
            "its rotary base depends on the length of the text"
            if by_length
            else "its layer states cannot be taken back"
        )
        raise GryphonError(
            "invalid_request",
            f"speculation is not possible with {resident.ref.name}: {why}. Leave it out.",
        )
