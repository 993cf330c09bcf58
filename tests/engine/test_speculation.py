"""Speculation changes how fast an answer comes, and nothing else about it.

A forward pass of several tokens may differ from passes of one in a logit's last bits, as a batch
does: so where an answer first differs from the one without speculation, it is excused as in
`test_batch_equals_single.py`, only for a token that is as good within `LAST_BITS`. That is expected
never on these models.
"""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

import mlxmodels
from app.engine import speculation as speculating
from app.engine.admission import PREFILL_CHUNK
from app.engine.batch import Row
from app.engine.drafting import LookupDrafter
from app.engine.protocol import (
    DraftModel,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Progress,
    PromptLookup,
    Sampling,
    Token,
    Usage,
    check_request,
)
from app.engine.rollback import Checkpoint, trimmed
from app.engine.sampling import RowGenerator
from app.engine.scheduler import Scheduler
from app.errors import GryphonError
from mlxmodels.footprint import MIN_CHUNK, footprint

from ..tiny_models import GEMMA2, LLAMA, OPEN_LLAMA, RECURRENT_GEMMA, byte_tokenizer, write_model
from .test_batch_equals_single import FAMILIES, Entry, first_difference, is_near_tie

GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=0.8, top_p=0.95, seed=7)
XTC = Sampling(temperature=1.0, xtc_probability=0.5, seed=11)
PENALIZED = Sampling(
    temperature=0.6,
    seed=5,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    logit_bias={3: 2.0, 9: -100.0},
)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelRef, ModelRef]]:
    """Of every family a model, and one of other weights that guesses badly for it."""
    root = tmp_path_factory.mktemp("speculation")

    def written(name: str, seed: int) -> ModelRef:
        directory = root / f"{name.replace(' ', '_')}-{seed}"
        return ModelRef(directory.name, str(write_model(directory, FAMILIES[name], seed=seed)))

    return {name: (written(name, 0), written(name, 1)) for name in FAMILIES}


class Run:
    """Requests through a scheduler on the test's own thread, and all that it says about them."""

    def __init__(self, prefix_cache_bytes: int = 0, **options: Any) -> None:
        self.scheduler = Scheduler(prefix_cache_bytes, **options)
        self.events: list[Event] = []
        self.rows: dict[str, Row] = {}
        self.on_event: Callable[[Event], None] = lambda event: None

    def submit(self, request: GenerationRequest) -> None:
        check_request(request)
        assert request.prompt_tokens is not None
        self.rows[request.id] = Row(request, self._happened, list(request.prompt_tokens))
        self.scheduler.submit(self.rows[request.id])

    def _happened(self, event: Event) -> None:
        assert event.id not in self.ended, f"{event.id} went on after its end: {event}"
        self.events.append(event)
        self.on_event(event)
        if len(self.ended) == len(self.rows):
            self.scheduler.stop()

    @property
    def ended(self) -> dict[str, Finished | Failed]:
        return {e.id: e for e in self.events if isinstance(e, Finished | Failed)}

    def play(self, *requests: GenerationRequest) -> Run:
        for request in requests:
            self.submit(request)
        self.scheduler.run()
        assert (self.scheduler.snapshot.running, self.scheduler.snapshot.state_bytes) == (0, 0)
        return self

    def play_in_turn(self, *requests: GenerationRequest) -> Run:
        """Each after the end of the one before, so that none has another beside it."""
        coming = list(requests)

        def go_on(event: Event) -> None:
            if isinstance(event, Finished | Failed) and coming:
                self.submit(coming.pop(0))

        self.on_event = go_on
        return self.play(coming.pop(0))

    def given(self, id: str) -> list[Token]:
        return [e for e in self.events if isinstance(e, Token) and e.id == id]

    def tokens(self, id: str) -> list[int]:
        return [token.token_id for token in self.given(id)]

    def end(self, id: str) -> Finished:
        end = self.ended[id]
        assert isinstance(end, Finished), end
        return end

    def usage(self, id: str) -> Usage:
        return self.end(id).usage


def request(model: ModelRef, id: str = "a", **fields: Any) -> GenerationRequest:
    fields = {"sampling": GREEDY, "max_tokens": 40, "prompt_tokens": repetitive(24)} | fields
    return GenerationRequest(id=id, model=model, **fields)


def repetitive(length: int, seed: int = 0) -> list[int]:
    """A text of a few short lines over and over, which a lookup finds much in."""
    draw = random.Random(f"{length} {seed}")
    lines = [draw.choices(range(256), k=5) for _ in range(2)]
    return [token for _ in range(length) for token in draw.choice(lines)][:length]


def check_same(asked: GenerationRequest, got: list[int], expected: list[int]) -> int:
    """Near ties, 0 or 1."""
    position = first_difference(got, expected)
    assert position is not None or len(got) == len(expected)
    if position is None:
        return 0
    plain = msgspec.structs.replace(asked, speculation=None)
    assert is_near_tie(
        Entry(plain, asked.prompt_tokens or []), expected, position, got[position]
    ), f"token {position} is {got[position]} with speculation and {expected[position]} without"
    return 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_one_without_speculation(
    pairs: dict[str, tuple[ModelRef, ModelRef]],
    record_property: Callable[[str, object], None],
    family: str,
) -> None:
    """In states that can be trimmed and that cannot, within the windows of 8 and far beyond."""
    model, other = pairs[family]
    asked = {
        f"{number} {kind}": request(
            model,
            f"{number} {kind}",
            sampling=sampling,
            prompt_tokens=repetitive((1, 41, 300, 9)[number]),
            min_tokens=(0, 10, 0, 5)[number],
            speculation=speculation,
        )
        for kind, speculation in {
            "plain": None,
            "lookup": PromptLookup(),
            "right": DraftModel(model, tokens=3),
            "wrong": DraftModel(other),
        }.items()
        for number, sampling in enumerate((GREEDY, SEEDED, XTC, PENALIZED))
    }
    run = Run().play_in_turn(*asked.values())
    plain = {id[0]: run.tokens(id) for id in asked if "plain" in id}
    near_ties = sum(check_same(asked[id], run.tokens(id), plain[id[0]]) for id in asked)
    drafted = sum(run.usage(id).drafted_tokens for id in asked)
    right = sum(run.usage(id).accepted_tokens for id in asked)
    assert right > 40 and drafted - right > 40, "this test needs guesses of both kinds"
    record_property("near_ties", near_ties)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, XTC], ids=["greedy", "seeded", "xtc"])
@pytest.mark.parametrize("family", ["open_llama", "gemma2", "recurrent_gemma", "zoo qwen3_next"])
def test_a_model_that_drafts_for_itself_is_always_right(
    pairs: dict[str, tuple[ModelRef, ModelRef]], family: str, sampling: Sampling
) -> None:
    model, _ = pairs[family]
    asked = request(model, sampling=sampling, speculation=DraftModel(model, tokens=4))
    usage = Run().play(asked).usage("a")
    # 40 tokens in 8 passes of 5.
    assert (usage.drafted_tokens, usage.accepted_tokens) == (32, 32)


@pytest.mark.parametrize("family", ["open_llama", "recurrent_gemma"])
def test_logprobs_are_those_of_the_row_without_speculation(
    pairs: dict[str, tuple[ModelRef, ModelRef]], family: str
) -> None:
    model, _ = pairs[family]
    sampling = Sampling(temperature=0.6, seed=5, frequency_penalty=0.2)
    asked = request(model, sampling=sampling, logprobs=True, top_logprobs=3)
    plain = Run().play(asked)
    fast = Run().play(msgspec.structs.replace(asked, speculation=DraftModel(model)))
    assert fast.usage("a").accepted_tokens > 5
    for want, got in zip(plain.given("a"), fast.given("a"), strict=True):
        assert (got.token_id, got.text) == (want.token_id, want.text)
        assert want.logprob is not None and got.logprob is not None
        assert got.logprob.logprob == pytest.approx(want.logprob.logprob, abs=1e-4)
        assert [top.token_id for top in got.top] == [top.token_id for top in want.top]


def test_a_row_that_guesses_badly_goes_on_in_the_batch(
    pairs: dict[str, tuple[ModelRef, ModelRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its counts, its random numbers and its states, in the middle of the answer."""
    monkeypatch.setattr(speculating, "_FEWEST_RIGHT", 1000)
    for family in ("nemotron", "recurrent_gemma"):
        model, other = pairs[family]
        plain = [
            request(model, f"plain {i}", sampling=sampling, max_tokens=90, min_tokens=80)
            for i, sampling in enumerate((GREEDY, XTC, PENALIZED))
        ]
        asked = [
            msgspec.structs.replace(each, id=f"fast {i}", speculation=DraftModel(other))
            for i, each in enumerate(plain)
        ]
        run = Run().play_in_turn(*plain, *asked)
        for one, two in zip(plain, asked, strict=True):
            assert 16 <= run.usage(two.id).drafted_tokens <= 16 * 4
            check_same(two, run.tokens(two.id), run.tokens(one.id))


def test_a_text_without_repetition_costs_few_passes_of_its_own(
    pairs: dict[str, tuple[ModelRef, ModelRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pairs["open_llama"]
    monkeypatch.setattr(LookupDrafter, "draft", lambda *_: [])
    passes: list[int] = []
    step = speculating.Lane.step
    monkeypatch.setattr(
        speculating.Lane, "step", lambda self, deliver: (passes.append(1), step(self, deliver))
    )
    asked = request(model, max_tokens=100)
    run = Run().play(msgspec.structs.replace(asked, speculation=PromptLookup()))
    assert len(passes) == 64
    monkeypatch.undo()
    assert run.tokens("a") == Run().play(asked).tokens("a")


# The ends of an answer.


def ending(tmp_path: Path, name: str, config: dict[str, Any]) -> tuple[ModelRef, list[int]]:
    """A model of those weights whose 8th greedy token ends the answer, and what comes before."""
    free = ModelRef("free", str(write_model(tmp_path / f"{name}-free", config)))
    tokens = Run().play(request(free, max_tokens=20)).tokens("a")
    end = next(i for i in range(7, 20) if tokens[i] not in tokens[:i])
    path = write_model(tmp_path / name, config, eos_token_id=tokens[end])
    return ModelRef(name, str(path)), tokens[:end]


@pytest.mark.parametrize("config", [OPEN_LLAMA, RECURRENT_GEMMA, LLAMA], ids=["ol", "rg", "llama"])
def test_nothing_follows_an_end_of_sequence_among_right_guesses(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """And what is kept of the row serves the next turn as if it had been computed anew."""
    model, expected = ending(tmp_path, "eos", config)
    asked = request(model, max_tokens=60, speculation=DraftModel(model, tokens=6))
    turn = request(model, "b", prompt_tokens=repetitive(24) + expected + [7, 8, 9])
    run = Run(prefix_cache_bytes=2**24)
    run.on_event = lambda event: run.submit(turn) if event.id == "a" and event in [
        run.ended.get("a")
    ] else None  # fmt: skip
    run.play(asked)
    assert run.tokens("a") == expected and run.end("a").reason == "stop"
    usage = run.usage("a")
    assert usage.completion_tokens == len(expected)
    assert usage.drafted_tokens > usage.accepted_tokens  # some lay behind the end
    # States that cannot be trimmed may be from before the last pass.
    behind = 0 if config["model_type"] != "recurrent_gemma" else 7
    assert run.usage("b").cached_tokens >= 24 + len(expected) - behind
    assert run.tokens("b") == Run().play(turn).tokens("b")


def test_an_end_of_sequence_among_guesses_may_come_from_min_tokens_on(tmp_path: Path) -> None:
    model, expected = ending(tmp_path, "eos", OPEN_LLAMA)
    speculation = DraftModel(model, tokens=6)
    for more, reason in ((0, "stop"), (1, "length")):
        fields = {"min_tokens": len(expected) + more, "max_tokens": len(expected) + 1}
        asked = request(model, speculation=speculation, **fields)
        plain = request(model, "plain", **fields)
        run = Run().play_in_turn(plain, asked)
        assert run.tokens("a") == run.tokens("plain")
        assert len(run.tokens("a")) == len(expected) + more
        assert run.end("a").reason == run.end("plain").reason == reason


def test_a_stop_string_and_max_tokens_end_it_among_right_guesses(
    pairs: dict[str, tuple[ModelRef, ModelRef]],
) -> None:
    model, _ = pairs["open_llama"]
    lane = DraftModel(model, tokens=8)
    whole = Run().play(request(model))
    texts = [token.text for token in whole.given("a")]
    stop = next(text for text in texts[4:] if text and texts.index(text) % 9 not in (0, 8))
    for fields in ({"max_tokens": 13}, {"max_tokens": 1}, {"stop": [stop]}):
        plain = Run().play(request(model, **fields))
        fast = Run().play(request(model, **fields, speculation=lane))
        assert fast.tokens("a") == plain.tokens("a")
        got, want = fast.end("a"), plain.end("a")
        assert (got.reason, got.text) == (want.reason, want.text)
        assert got.usage.completion_tokens == want.usage.completion_tokens
    assert want.reason == "stop"


@pytest.mark.parametrize("family", ["open_llama", "gemma2", "recurrent_gemma", "zoo falcon_h1"])
def test_what_a_cancelled_row_leaves_is_what_it_had_accepted(
    pairs: dict[str, tuple[ModelRef, ModelRef]], family: str
) -> None:
    model, other = pairs[family]
    for speculation in (DraftModel(model), DraftModel(other), PromptLookup()):
        run = Run(prefix_cache_bytes=2**24)
        asked = request(model, speculation=speculation, max_tokens=200)

        def happened(event: Event, run: Run = run) -> None:
            if isinstance(event, Token) and event.id == "a" and len(run.tokens("a")) == 9:
                run.scheduler.cancel(run.rows["a"])
            if isinstance(event, Finished) and event.id == "a":
                prompt = repetitive(24) + run.tokens("a") + [1, 2]
                run.submit(request(model, "b", prompt_tokens=prompt))

        run.on_event = happened
        run.play(asked)
        assert run.end("a").reason == "cancelled"
        assert 9 <= len(run.tokens("a")) <= 9 + 8
        assert run.usage("b").cached_tokens >= 23  # the prompt but its last
        turn = run.rows["b"].generation
        assert run.tokens("b") == Run().play(turn).tokens("b")


# Beside others.


@pytest.mark.parametrize("family", ["open_llama", "recurrent_gemma", "zoo falcon_h1"])
def test_lanes_and_the_batch_leave_each_other_alone(
    pairs: dict[str, tuple[ModelRef, ModelRef]], family: str
) -> None:
    model, other = pairs[family]
    rows = [
        request(model, "plain", max_tokens=60),
        request(model, "seeded", sampling=SEEDED, prompt_tokens=repetitive(150, 1)),
        request(model, "lookup", speculation=PromptLookup(), prompt_tokens=repetitive(41, 2)),
        request(model, "draft", sampling=XTC, speculation=DraftModel(model)),
        request(model, "bad", speculation=DraftModel(model, tokens=2), sampling=PENALIZED),
    ]
    together = Run().play(*rows)
    for row in rows:
        check_same(row, together.tokens(row.id), Run().play(row).tokens(row.id))


def test_a_running_stream_waits_one_step_or_chunk_of_a_lane_at_most(
    pairs: dict[str, tuple[ModelRef, ModelRef]],
) -> None:
    """While a draft model reads 500 tokens, and while two lanes write."""
    model, other = pairs["open_llama"]
    run = Run()

    def happened(event: Event) -> None:
        if isinstance(event, Token) and event.id == "old" and "one" not in run.rows:
            for id in ("one", "two"):
                prompt = repetitive(450)
                run.submit(request(model, id, prompt_tokens=prompt, speculation=DraftModel(other)))

    run.on_event = happened
    turns: list[str] = []
    for name, work in (("prefill", "_prefill_chunk"), ("step", "_decode"), ("lane", "_speculate")):
        original = getattr(run.scheduler, work)

        def counted(*given: Any, name: str = name, original: Any = original) -> None:
            turns.append(name)
            original(*given)

        setattr(run.scheduler, work, counted)
    # The draft model is loaded first: that waits for all who run, as another model would.
    warm = request(model, "warm", speculation=DraftModel(other), max_tokens=1)
    run.play(warm, request(model, "old", max_tokens=60))
    between = "".join({"prefill": "p", "step": ".", "lane": "l"}[turn] for turn in turns)
    busy = between[between.index(".") : between.rindex(".")]
    assert "pp" not in busy and "ll" not in busy
    chunks = math.ceil(450 / PREFILL_CHUNK[mx.default_device().type])
    assert between.count("p") >= 2 * 2 * chunks  # of two prompts, for each of the two models


def test_an_error_in_a_lane_ends_its_row_alone(
    pairs: dict[str, tuple[ModelRef, ModelRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pairs["gemma"]

    def fail(self: LookupDrafter, known: list[int], *_: object) -> list[int]:
        if len(known) == 30:
            raise RuntimeError("planted")
        return []

    monkeypatch.setattr(LookupDrafter, "draft", fail)
    plain = request(model, "plain")
    run = Run(prefix_cache_bytes=2**24).play(plain, request(model, speculation=PromptLookup()))
    failed = run.ended["a"]
    assert isinstance(failed, Failed) and failed.code == "engine_error"
    assert run.tokens("plain") == Run().play(plain).tokens("plain")


# What is refused.


def test_a_draft_model_of_another_vocabulary_is_refused_with_both_names(
    pairs: dict[str, tuple[ModelRef, ModelRef]], tmp_path: Path
) -> None:
    model, _ = pairs["gemma"]
    path = write_model(tmp_path / "swapped", GEMMA2)
    tokenizer = byte_tokenizer()
    text = tokenizer.to_str().replace('"<eos>"', '"<end>"')
    (path / "tokenizer.json").write_text(text)
    asked = request(model, speculation=DraftModel(ModelRef("swapped", str(path))))
    run = Run().play(asked, request(model, "after"))
    failed = run.ended["a"]
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert "swapped" in failed.message and model.name in failed.message
    assert len(run.tokens("after")) == 40


def test_a_draft_model_that_is_not_there_fails_its_row_alone(
    pairs: dict[str, tuple[ModelRef, ModelRef]], tmp_path: Path
) -> None:
    model, _ = pairs["gemma"]
    gone = DraftModel(ModelRef("gone", str(tmp_path / "gone")))
    run = Run().play(request(model, speculation=gone), request(model, "after"))
    failed = run.ended["a"]
    assert isinstance(failed, Failed) and failed.code == "invalid_model"
    assert len(run.tokens("after")) == 40


def test_a_draft_model_is_loaded_once_and_counted(
    pairs: dict[str, tuple[ModelRef, ModelRef]],
) -> None:
    model, other = pairs["gemma"]
    alone, both = Run().play(request(model)), Run()
    asked = request(model, speculation=DraftModel(other))
    both.play(asked, msgspec.structs.replace(asked, id="b"))
    loads = [e for e in both.events if isinstance(e, Progress) and e.phase == "load"]
    assert [e.detail for e in loads] == [f"loading {model.name}"] * 2 + [
        f"loading {other.name}"
    ] * 2
    weights = both.scheduler.snapshot.weight_bytes
    assert weights == 2 * alone.scheduler.snapshot.weight_bytes


def test_a_draft_model_that_is_refused_leaves_the_one_before_and_its_account(
    pairs: dict[str, tuple[ModelRef, ModelRef]], tmp_path: Path
) -> None:
    model, other = pairs["gemma"]
    path = write_model(tmp_path / "swapped", GEMMA2)
    text = byte_tokenizer().to_str().replace('"<eos>"', '"<end>"')
    (path / "tokenizer.json").write_text(text)
    refused = DraftModel(ModelRef("swapped", str(path)))
    run = Run().play_in_turn(
        request(model, "first", speculation=DraftModel(other)),
        request(model, "refused", speculation=refused),
        request(model, "last", speculation=DraftModel(other)),
    )
    loads = [e for e in run.events if isinstance(e, Progress) and e.phase == "load"]
    assert isinstance(run.ended["refused"], Failed) and len(loads) == 4
    scheduler = run.scheduler
    assert scheduler._room is not None and scheduler._lanes.draft is not None
    assert scheduler._room._weight_bytes == scheduler.snapshot.weight_bytes


FAT = OPEN_LLAMA | {"num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 2}
FAT |= {"max_position_embeddings": 4096}
WIDE = OPEN_LLAMA | {"hidden_size": 128, "intermediate_size": 8192}


@pytest.fixture(scope="module")
def fat_and_wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRef, ModelRef]:
    """A model with large states and one with large weights."""
    root = tmp_path_factory.mktemp("fat")
    names = {"fat": FAT, "wide": WIDE}
    fat, wide = (ModelRef(n, str(write_model(root / n, c))) for n, c in names.items())
    return fat, wide


def test_a_draft_model_that_nobody_uses_gives_way_to_a_prompt(
    fat_and_wide: tuple[ModelRef, ModelRef],
) -> None:
    fat, wide = fat_and_wide
    own, draft = (footprint(Path(each.path), expand=True) for each in fat_and_wide)
    beside = own.row_bytes(MIN_CHUNK, 256) + draft.row_bytes(MIN_CHUNK, 256)
    assert beside < own.row_bytes(MIN_CHUNK, 601)
    budget = own.weight_bytes + draft.weight_bytes + beside
    prompt = repetitive(600)
    run = Run(memory_bytes=budget).play_in_turn(
        request(fat, "drafted", prompt_tokens=[1], max_tokens=4, speculation=DraftModel(wide)),
        request(fat, "long", prompt_tokens=prompt, max_tokens=4),
        request(fat, "again", prompt_tokens=[1], max_tokens=4, speculation=DraftModel(wide)),
    )
    assert len(run.tokens("long")) == 4
    assert run.tokens("again") == run.tokens("drafted") and run.usage("again").drafted_tokens


def test_what_is_kept_makes_way_for_a_draft_model_before_it_is_loaded(
    fat_and_wide: tuple[ModelRef, ModelRef],
) -> None:
    fat, wide = fat_and_wide
    own, draft = (footprint(Path(each.path), expand=True) for each in fat_and_wide)
    budget = own.weight_bytes + draft.least_bytes + own.row_bytes(128, 256)
    run, kept = Run(2**30, memory_bytes=budget), list[int]()
    genuine = run.scheduler._load_progress

    def load_progress(row: Row, ref: ModelRef) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if ref == wide and not done:
                prefixes = run.scheduler._prefixes
                assert prefixes is not None
                kept.extend([run.scheduler.snapshot.prefix_bytes, prefixes.nbytes])
            genuine(row, ref)(done, total)

        return progress

    run.scheduler._load_progress = load_progress  # type: ignore[method-assign]
    run.play_in_turn(
        *(request(fat, f"{i}", prompt_tokens=repetitive(99, i), max_tokens=1) for i in range(9)),
        request(fat, "drafted", prompt_tokens=[1], max_tokens=4, speculation=DraftModel(wide)),
    )
    assert len(run.tokens("drafted")) == 4
    before, then = kept
    assert then < before and own.weight_bytes + then + draft.least_bytes <= budget


@pytest.mark.parametrize("speculation", [PromptLookup(), "draft"], ids=["lookup", "draft"])
def test_nothing_is_left_of_models_that_have_speculated(
    fat_and_wide: tuple[ModelRef, ModelRef], speculation: Any
) -> None:
    fat, wide = fat_and_wide
    run = Run()
    asked = request(wide, speculation=DraftModel(wide) if speculation == "draft" else speculation)
    before: list[int] = []
    after: list[int] = []

    def happened(event: Event) -> None:
        if isinstance(event, Finished) and event.id == "a":
            run.submit(request(fat, "b", max_tokens=1))
        elif isinstance(event, Finished):
            (before if not run.rows.get("a") else after).append(mx.get_active_memory())
            if not after:
                run.submit(asked)

    run.on_event = happened
    run.play(request(fat, "first", max_tokens=1))
    assert after[0] - before[0] < 2**20


def test_a_row_that_is_cancelled_in_its_prefill_takes_the_drafts_states_with_it(
    pairs: dict[str, tuple[ModelRef, ModelRef]],
) -> None:
    """At once, not when Python next looks for cycles."""
    model, other = pairs["open_llama"]
    run, lanes = Run(), list[weakref.ref[speculating.Lane]]()

    def happened(event: Event) -> None:
        lane = run.rows["a"].lane
        if isinstance(event, Progress) and event.phase == "prefill" and not lanes and lane:
            lanes.append(weakref.ref(lane))
            run.scheduler.cancel(run.rows["a"])

    run.on_event = happened
    gc.disable()
    try:
        asked = request(model, prompt_tokens=repetitive(400), speculation=DraftModel(other))
        run.play(asked)
        assert lanes[0]() is None and not run.rows["a"].caches
    finally:
        gc.enable()


def test_a_model_that_rotates_by_length_is_refused_by_name(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 8.0}
    path = write_model(tmp_path / "m", OPEN_LLAMA, rope_scaling=scaling)
    asked = request(ModelRef("dynamic", str(path)), speculation=PromptLookup())
    failed = Run().play(asked).ended["a"]
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert "dynamic" in failed.message and "rotary base" in failed.message


@pytest.mark.parametrize(
    ("speculation", "said"),
    [
        (PromptLookup(ngram=0), "speculation.ngram must be 1 to 16, got 0"),
        (PromptLookup(tokens=17), "speculation.tokens must be 1 to 16, got 17"),
        (DraftModel(ModelRef("m", "/m"), tokens=0), "speculation.tokens must be 1 to 16, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(speculation: Any, said: str) -> None:
    with pytest.raises(GryphonError, match=said):
        check_request(request(ModelRef("m", "/m"), speculation=speculation))


# The parts.


@pytest.mark.parametrize("family", ["gemma", "gemma2", "recurrent_gemma", "zoo falcon_h1"])
@pytest.mark.parametrize("before", [3, 7, 8, 20])
def test_states_taken_back_are_the_states_before(
    pairs: dict[str, tuple[ModelRef, ModelRef]], family: str, before: int
) -> None:
    loaded = mlxmodels.load(pairs[family][0].path)

    def after(tokens: list[int], states: list[Any]) -> mx.array:
        return loaded.model(mx.array([tokens]), cache=states)[0, -1]

    states, fresh = loaded.make_cache(), loaded.make_cache()
    text = repetitive(before)
    after(text, states)
    checkpoint = Checkpoint(states)
    after([1, 2, 3], states)
    states = checkpoint.back(states, 3)
    after(text, fresh)
    assert mx.allclose(after([4, 5], states), after([4, 5], fresh), atol=1e-5)
    if trimmed(states, 1):
        fresh = loaded.make_cache()
        after([*text, 4], fresh)
        assert mx.allclose(after([6], states), after([6], fresh), atol=1e-5)
    else:
        assert family == "recurrent_gemma" or before + 2 > 8 or family == "zoo falcon_h1"


def test_a_lookup_copies_the_latest_place_and_goes_on_with_its_copy() -> None:
    def draft(known: list[int], count: int, ngram: int = 3) -> list[int]:
        return LookupDrafter(ngram).draft(known, [0.0] * count, [False] * count)

    assert draft([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 2) == [8, 7]
    assert draft([5, 6, 5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert draft([4, 1, 2, 9, 3, 1, 2], 1) == [9]  # two tokens will do
    assert draft([1, 5, 2, 5], 3) == [] and draft([1, 5, 2, 5], 1, ngram=1) == [2]
    assert draft([7], 3) == [] and draft([7, 7], 0, ngram=1) == []
    assert draft([0xD800, 0xDFFF, 300_000, 0xD800, 0xDFFF], 1) == [300_000]  # any id


def test_numbers_taken_back_come_again_in_order() -> None:
    plain, generator = RowGenerator(3), RowGenerator(3)
    expected = [plain.uniform() for _ in range(9)]
    drawn = [generator.uniform() for _ in range(5)]
    generator.take_back(drawn[2:])
    drawn = drawn[:2] + [generator.uniform() for _ in range(2)]
    generator.take_back(drawn[3:])
    drawn = drawn[:3] + [generator.uniform() for _ in range(6)]
    assert drawn == expected and generator.uniform() == plain.uniform()
