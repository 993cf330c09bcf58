"""States kept for other requests: a row that continues from them gives what a replay gives."""

from __future__ import annotations

import gc
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as zoo

import mlxmodels
from app.engine import prefix_cache, preparation, state_leaves
from app.engine.admission import PREFILL_CHUNK
from app.engine.batch import Launch
from app.engine.client import EngineClient
from app.engine.memory import MemoryBudget
from app.engine.prefix_cache import PrefixCache
from app.engine.preparation import shared_length
from app.engine.protocol import (
    Accepted,
    Failed,
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
)
from app.engine.resident import load_resident, plan_resident
from app.engine.scheduler import Scheduler
from app.engine.state_leaves import can_keep
from app.errors import GryphonError
from app.settings import Settings
from mlxmodels.cache import LayerState, RecurrentState, WindowCache
from mlxmodels.full_cache import FullCache

from ..rounds import rounds
from ..tiny_models import (
    OPEN_LLAMA,
    byte_tokenizer,
    write_model,
)
from .asking import FAMILIES, MIB, TRIMMABLE, Asked, engine, rendered, tokens_of


@pytest.fixture(autouse=True)
def no_error_is_only_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Keeping states may fail without failing answers, but not in these tests."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert all("expected" in str(record.exc_info) for record in errors), errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ids", "text"])
@pytest.mark.parametrize("round", rounds(1))
def test_any_walk_through_a_conversation_gives_what_a_replay_gives(
    checkpoints: dict[str, ModelRef], family: str, kind: str, round: int
) -> None:
    """Extend, edit the last message, branch from an earlier one, retry, cancel, begin anew.

    By ids the next turn holds exactly the ids that were generated; by text it holds what their text
    tokenizes to, which for a random model is something else.
    """
    draw = random.Random(f"{family} {kind} {round}")
    model = checkpoints[family]
    tokenizer = mlxmodels.load(model.path).tokenizer
    prompts = preparation._Prompts(60.0)

    def content() -> list[int]:
        return draw.choices(range(64), k=draw.choice([1, 3, 9, 40, 150]))

    def prepare(turns: list[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
        if kind == "ids":
            return rendered(turns)
        messages = [Message(role, tokenizer.decode(ids)) for role, ids in turns]
        prompt = prompts.tokenized(preparation.Prompt(model.path, messages=messages))
        return prompt.tokens, prompt.boundaries

    turns = [("user", content())]
    reused = 0
    budget = draw.choice([MIB // 4, 64 * MIB])
    with engine(model, budget) as cached, engine(model, 0) as plain:
        for step in range(12):
            sampling = draw.choice(
                [Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9, seed=step)]
            )
            options: dict[str, Any] = {"sampling": sampling, "max_tokens": draw.randint(1, 14)}
            if draw.random() < 0.25:
                options["cancel_after"] = draw.randint(1, 6)
            prompt, boundaries = prepare(turns)
            if len(prompt) > 450:
                turns = [("user", content())]
                continue
            got = cached.ask(prompt, boundaries, **options)
            options.pop("cancel_after", None)
            want = plain.ask(prompt, boundaries, **options)
            assert plain.prefix_bytes == want.cached == 0
            # A cancelled answer ends a little after it was cancelled.
            expected = want.tokens if got.cancel_after is None else want.tokens[: len(got.tokens)]
            assert got.tokens == expected, f"step {step}, {got.cached} of {len(prompt)} cached"
            reused += got.cached
            assert cached.prefix_bytes <= budget
            action = draw.choice(["extend", "extend", "edit", "branch", "retry", "anew"])
            if action == "extend":
                turns += [("assistant", got.tokens), ("user", content())]
            elif action == "edit":
                turns[-1] = "user", content()
            elif action == "branch":
                at = draw.randrange(0, len(turns), 2)
                turns = [*turns[:at], ("user", content())]
            elif action == "anew":
                turns = [("user", content())]
    assert reused > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_kind_of_request_computes(checkpoints: dict[str, ModelRef], family: str) -> None:
    user, other = tokens_of(70, "user"), tokens_of(30, "other")
    first, boundaries = rendered([("system", tokens_of(50)), ("user", user)])
    with engine(checkpoints[family]) as cached:
        cold = cached.ask(first, boundaries)
        assert cold.cached == 0
        retried = cached.ask(first, boundaries, sampling=Sampling(temperature=0.9, seed=1))
        assert retried.cached == len(first) - 1
        edited, _ = rendered([("system", tokens_of(50)), ("user", other)])
        same = boundaries[0] + 1  # the newline after the role, which no boundary counts on
        assert edited[:same] == first[:same] and edited[same] != first[same]
        expected = same if family in TRIMMABLE else boundaries[0]
        assert cached.ask(edited, boundaries).cached == expected
        # The last token of an answer that was cut short has not been read by anything.
        turns = [("system", tokens_of(50)), ("user", user), ("assistant", cold.tokens)]
        second, _ = rendered([*turns, ("user", other)])
        assert cached.ask(second).cached == len(first) + len(cold.tokens) - 1
        assert cached.ask(tokens_of(40, "unrelated")).cached == 0
        assert cached.ask([5]).cached == 0


@pytest.mark.parametrize("family", ["recurrent_gemma", "open_llama", "zoo llama"])
def test_the_next_turn_continues_after_the_token_that_ended_the_answer(
    checkpoints: dict[str, ModelRef], tmp_path: Path, family: str
) -> None:
    with engine(checkpoints[family], 0) as plain:
        free = plain.ask(tokens_of(20)).tokens
    end = next(id for id in free if free.index(id) >= 2)
    path = write_model(tmp_path / "eos", FAMILIES[family], eos_token_id=end)
    with engine(ModelRef("eos", str(path))) as cached:
        asked = cached.ask(tokens_of(20))
        assert asked.tokens == free[: free.index(end)] and asked.end.reason == "stop"  # type: ignore[union-attr]
        answered = [*tokens_of(20), *asked.tokens, end]
        assert cached.ask([*answered, 1, 2]).cached == len(answered)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cancelled_answer_is_continued_from_where_it_was_cancelled(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    """Also when it shares a batch, where its states are taken out of those of all rows."""
    with engine(checkpoints[family]) as cached:
        neighbours = [cached.submit(tokens_of(n), max_tokens=40) for n in (7, 30)]
        asked = cached.ask(tokens_of(25), max_tokens=40, cancel_after=4)
        assert 4 <= len(asked.tokens) < 40
        for neighbour in neighbours:
            assert neighbour.ended.wait(60)
        longer = cached.ask([*tokens_of(25), *asked.tokens, 3, 4])
        assert longer.cached == 25 + len(asked.tokens)
    with engine(checkpoints[family], 0) as plain:
        assert plain.ask(longer.prompt).tokens == longer.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_cancelled_on_the_way_is_read_on_from_there(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    prompt = tokens_of(400)
    with engine(checkpoints[family]) as cached, engine(checkpoints[family], 0) as plain:
        cancelled = cached.ask(prompt, cancel_after=0)
        assert not cancelled.tokens
        again = cached.ask(prompt)
        assert again.cached == cancelled.read < 400
        assert again.tokens == plain.ask(prompt).tokens


def test_turn_two_of_a_long_conversation_computes_a_twentieth_of_it(
    checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn two, a retry, and an edit of the last message, in tokens that the model reads."""
    from mlxmodels import recurrent_gemma

    read = 0
    genuine = recurrent_gemma.Griffin.__call__

    def counting(self: Any, inputs: mx.array, *rest: Any) -> mx.array:
        nonlocal read
        read += inputs.size
        return genuine(self, inputs, *rest)

    monkeypatch.setattr(recurrent_gemma.Griffin, "__call__", counting)

    def prompt_tokens_read(asked: Asked) -> int:
        nonlocal read
        count, read = read - (len(asked.tokens) - 1), 0
        return count

    turns = [
        (role, tokens_of(200, f"{role} {i}")) for i in range(3) for role in ("user", "assistant")
    ]
    with engine(checkpoints["recurrent_gemma"]) as cached:
        question = [*turns, ("user", tokens_of(9))]
        cold = cached.ask(*rendered(question))
        assert prompt_tokens_read(cold) == len(cold.prompt)
        after = [*question, ("assistant", cold.tokens), ("user", tokens_of(9, "next"))]
        for conversation in (after, question, [*turns, ("user", tokens_of(9, "edited"))]):
            warm = cached.ask(*rendered(conversation))
            assert prompt_tokens_read(warm) == len(warm.prompt) - warm.cached
            assert len(warm.prompt) - warm.cached <= len(cold.prompt) / 20


def test_a_long_prompt_without_messages_is_kept_now_and_then(
    checkpoints: dict[str, ModelRef],
) -> None:
    """An edit far into a prompt that cannot be trimmed computes from the last of those places."""
    prompt = tokens_of(1500)
    with engine(checkpoints["recurrent_gemma"]) as cached:
        cached.ask(prompt, max_tokens=1)
        changed = [*prompt[:1300], 7, 7, 7]
        assert changed[1300] != prompt[1300]
        step = 4 * PREFILL_CHUNK[mx.default_device().type]
        assert cached.ask(changed, max_tokens=1).cached == 1300 // step * step > 0


@pytest.mark.parametrize("family", TRIMMABLE)
def test_a_prompt_continues_from_a_row_that_still_runs(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    shared = tokens_of(90, "shared")
    with engine(checkpoints[family]) as cached, engine(checkpoints[family], 0) as plain:
        first = cached.submit(shared, max_tokens=300)
        others = [[*shared, *tokens_of(n, "tail")] for n in (1, 40)] + [shared]
        for prompt in [*others, [*shared[:40], *tokens_of(9, "tail")], tokens_of(9)]:
            asked = cached.ask(prompt, max_tokens=20)
            expected = min(shared_length(prompt, shared), len(prompt) - 1)
            # Its last token may not be fed yet.
            assert asked.cached in ((expected, expected - 1) if expected >= 40 else (0,))
            assert asked.tokens == plain.ask(prompt, max_tokens=20).tokens
        assert not first.ended.is_set(), "it was not running"
        assert first.ended.wait(60)
        assert first.tokens == plain.ask(shared, max_tokens=300).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_prefix_at_the_same_time(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    shared = tokens_of(90, "shared")
    prompts = [[*shared, *tokens_of(n, "tail")] for n in (1, 2, 9, 40)] + [shared]
    with engine(checkpoints[family]) as cached, engine(checkpoints[family], 0) as plain:
        cached.ask([*shared, 1], [len(shared)], max_tokens=20)
        together = [cached.submit(prompt, max_tokens=20) for prompt in prompts]
        for asked in together:
            assert asked.ended.wait(60)
            if asked.prompt != shared:
                assert asked.cached >= len(shared)
            else:  # an entry of all its tokens leaves none to begin with
                assert asked.cached == (len(shared) - 1 if family in TRIMMABLE else 0)
            assert asked.tokens == plain.ask(asked.prompt, max_tokens=20).tokens


def test_another_model_finds_nothing_of_the_one_before(checkpoints: dict[str, ModelRef]) -> None:
    """Nor does the same model, loaded again."""
    with engine(checkpoints["recurrent_gemma"]) as cached:
        first = cached.ask(tokens_of(50))
        assert cached.prefix_bytes > 0
        other = cached.ask(tokens_of(50), model=checkpoints["open_llama"])
        again = cached.ask(tokens_of(50))
        assert [asked.cached for asked in (first, other, again)] == [0, 0, 0]
        assert again.tokens == first.tokens


def test_states_that_depend_on_the_length_of_a_prompt_are_not_kept(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 8.0}
    path = write_model(
        tmp_path / "dynamic", OPEN_LLAMA, max_position_embeddings=64, rope_scaling=scaling
    )
    with engine(ModelRef("dynamic", str(path))) as cached:
        cached.ask(tokens_of(100))
        assert cached.ask(tokens_of(100)).cached == 0
        assert cached.prefix_bytes == 0


def test_what_cannot_be_kept_costs_time_and_no_answer(
    checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("expected")

    with engine(checkpoints["recurrent_gemma"]) as cached:
        good = cached.ask(tokens_of(50))
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "insert", failing)
            cancelled = cached.ask(tokens_of(50, 1), cancel_after=2)
            assert cancelled.end.reason == "cancelled"  # type: ignore[union-attr]
        again = cached.ask(tokens_of(50))
        assert again.cached == 0 and again.tokens == good.tokens
        assert cached.ask(tokens_of(50)).cached == 49


# Boundaries.


def conversation(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def prefixes(path: Path, messages: list[Message]) -> list[str]:
    """The text of a prompt up to each of its boundaries."""
    tokens, boundaries, *_ = preparation._Prompts(60.0).tokenized(
        preparation.Prompt(str(path), messages=messages)
    )
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(tokens[:n], skip_special_tokens=False) for n in boundaries]


def test_boundaries_are_where_an_edit_and_the_next_turn_part_from_a_prompt(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    head = first + "<|im_start|>user"
    for question in ("What?", "0", "1", "\n0", "", "é"):
        assert prefixes(path, conversation("Hi", "Yes", question)) == [
            head,
            f"{head}\n{question}<|im_end|>\n<|im_start|>assistant",
        ]


def test_what_a_template_takes_out_of_earlier_turns_is_beyond_the_boundary(tmp_path: Path) -> None:
    """As templates of reasoning models do, and those that strip contents."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n<think>\n"
    )
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    question = prefixes(path, conversation("Hi", "<think>Hm</think> Yes  ", "  What?  "))
    assert question[-1].endswith("What?<|im_end|>\n<|im_start|>assistant")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (  # system texts only inside a user's turn
            "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% endif %}"
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}: {{ s }}"
            "{{ m.content }}{% endfor %}",
            ["<|im_start|>user: Be brief."],
        ),
        (  # nothing after an assistant's turn
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('No.') }}"
            "{% endif %}{{ m.content }}|{% endfor %}",
            ["Be brief.|"],
        ),
    ],
)
def test_boundaries_follow_the_template_whatever_it_does(
    tmp_path: Path, template: str, expected: list[str]
) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    found = prefixes(path, [Message("system", "Be brief."), Message("user", "Hi")])
    assert found[:1] == expected


def test_a_base_model_parts_where_the_last_message_begins(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    (path / "tokenizer_config.json").write_text("{}")
    assert prefixes(path, conversation("One", "Two", "Three"))[0] == "One\n\nTwo"


def test_boundaries_are_not_what_makes_a_prompt_too_slow(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    prompt = preparation.Prompt(str(path), messages=conversation("Hi"))
    assert preparation._Prompts(60.0).tokenized(prompt).boundaries
    tokens, boundaries, *_ = preparation._Prompts(1e-9).tokenized(prompt)
    assert tokens and not boundaries


@pytest.mark.parametrize("family", ["recurrent_gemma", "open_llama"])
def test_a_template_that_strips_and_an_answer_that_tokenizes_differently(
    checkpoints: dict[str, ModelRef], tmp_path: Path, family: str
) -> None:
    """The next turn shares no more than the ids before the answer, and that is reused."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    path = write_model(tmp_path / "model", FAMILIES[family])
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    prompts = preparation._Prompts(60.0)

    def prepare(*contents: str) -> preparation.TokenizedPrompt:
        return prompts.tokenized(preparation.Prompt(str(path), messages=conversation(*contents)))

    model = ModelRef("model", str(path))
    tokenizer = mlxmodels.load(path).tokenizer
    with engine(model) as cached, engine(model, 0) as plain:
        first = prepare("  How are you?  ")
        answer = cached.ask(
            first.tokens, first.boundaries, sampling=Sampling(temperature=0.9, seed=3)
        ).tokens
        text = f"  {tokenizer.decode(answer)}"
        second = prepare("  How are you?  ", text, "Sure?")
        assert second.tokens[len(first.tokens) :][: len(answer)] != answer
        asked = cached.ask(second.tokens, second.boundaries)
        assert asked.cached >= len(first.tokens) - 1
        assert asked.tokens == plain.ask(second.tokens, second.boundaries).tokens


async def test_the_engine_process_reports_what_it_reuses(checkpoints: dict[str, ModelRef]) -> None:
    client = EngineClient()
    cached: list[tuple[int, int]] = []
    try:
        for question in ("Why?", "Why?", "How?"):
            request = GenerationRequest(
                id=f"{len(cached)}",
                model=checkpoints["recurrent_gemma"],
                messages=[Message("system", "Be brief. " * 9), Message("user", question)],
                max_tokens=4,
            )
            async for event in client.stream(request):
                if isinstance(event, Accepted):
                    cached.append((event.cached_tokens, event.prompt_tokens))
        status = await client.status()
        assert status is not None and status.prefix_bytes > 0
    finally:
        await client.close()
    (cold, total), (retried, _), (edited, _) = cached
    assert cold == 0 and retried == total - 1 and 90 < edited < retried


# The budget.


@pytest.mark.parametrize(
    ("available", "budget"), [(1000 * MIB, 100 * MIB), (1000 * 1024 * MIB, 2048 * MIB), (0, None)]
)
def test_without_a_setting_the_budget_is_a_tenth_of_what_is_left(
    checkpoints: dict[str, ModelRef],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    budget: int | None,
) -> None:
    scheduler, model = Scheduler(None), checkpoints["open_llama"]
    resident = load_resident(model, plan_resident(model, MemoryBudget()), lambda *_: None)
    total = available + resident.loaded.nbytes
    monkeypatch.setattr(MemoryBudget, "now_bytes", lambda self: total)
    prefixes = scheduler._residency.new_prefix_cache(resident)
    assert (prefixes.budget_bytes if prefixes is not None else None) == budget


@pytest.mark.parametrize(("text", "expected"), [("", None), ("0", 0), ("1048576", MIB)])
def test_the_budget_is_a_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
) -> None:
    monkeypatch.setenv("GRYPHON_PREFIX_CACHE_BYTES", text)
    assert Settings.from_environment().prefix_cache_bytes == expected


@pytest.mark.parametrize("text", ["-1", "1 GB", "²"])
def test_another_budget_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GRYPHON_PREFIX_CACHE_BYTES", text)
    with pytest.raises(GryphonError, match="GRYPHON_PREFIX_CACHE_BYTES"):
        Settings.from_environment()


# The tree, with states that say which tokens they have read.


def full_state(tokens: list[int]) -> FullCache:
    state = FullCache()
    values = mx.array(tokens, mx.float32).reshape(1, 1, -1, 1)
    state.update(values, values)
    state.advance(len(tokens))
    return state


def recurrent_state(tokens: list[int]) -> RecurrentState:
    state = RecurrentState()
    state.begin(mx.zeros((1, len(tokens), 4)))
    read = [0, 0, 0, *tokens]
    state.conv = mx.array(read[-3:], mx.float32).reshape(1, 3, 1)
    state.hidden = mx.array([[len(tokens) + 1000.0 * sum(tokens)]])
    state.advance(len(tokens))
    return state


def window_state(tokens: list[int], window: int = 6) -> WindowCache:
    state = WindowCache(window)
    values = mx.array(tokens, mx.float32).reshape(1, 1, -1, 1)
    state.write_chunk(values, values)
    state.advance(len(tokens))
    return state


def fed(make: Callable[[], Any]) -> Callable[[list[int]], Any]:
    """Makes one of mlx-lm's states and has it read tokens."""

    def state_of(tokens: list[int]) -> Any:
        state = make()
        feed(state, tokens)
        return state

    return state_of


def feed(state: Any, tokens: list[int]) -> None:
    values = mx.array(tokens, mx.float32).reshape(1, 1, -1, 1)
    if isinstance(state, zoo.ArraysCache):
        state[0] = mx.array([[len(tokens) + 1000.0 * sum(tokens)]])
    elif isinstance(state, zoo.CacheList):
        for part in state.caches:
            feed(part, tokens)
    else:
        state.update_and_fetch(values, values)


KINDS: dict[str, list[Callable[[list[int]], Any]]] = {
    "full": [full_state],
    "recurrent": [recurrent_state],
    "window": [window_state],
    "mixed": [full_state, recurrent_state, window_state],
    "zoo keys": [fed(zoo.KVCache)],
    "zoo window": [fed(lambda: zoo.RotatingKVCache(6))],
    "zoo concatenated": [fed(zoo.ConcatenateKVCache)],
    "zoo chunked": [fed(lambda: zoo.ChunkedKVCache(6))],
    "zoo lists": [fed(lambda: zoo.CacheList(zoo.KVCache(), zoo.ArraysCache(1)))],
}


def content(state: Any, length: int) -> list[float]:
    """What a state says about the tokens that it has read."""
    if isinstance(state, zoo.CacheList):
        return [value for part in state.caches for value in content(part, length)]
    if isinstance(state, RecurrentState | zoo.ArraysCache):
        arrays = state.cache if isinstance(state, zoo.ArraysCache) else (state.hidden, state.conv)
        return [value for array in arrays for value in array.flatten().tolist()]  # type: ignore
    if isinstance(state, zoo.RotatingKVCache):
        return list(state._temporal_order(state.keys)[0, 0, :, 0].tolist())
    assert (state.offsets == (length,)) if isinstance(state, LayerState) else state.offset == length
    slots = min(length, state.window) if isinstance(state, WindowCache) else length
    assert state.keys is not None
    return list(state.keys[0, 0, :slots, 0].tolist())


def held_bytes(cache: PrefixCache) -> int:
    arrays: dict[int, int] = {}
    for node in cache._tree.root.subtree():
        assert node.entry is not None
        arrays |= {id(array): array.nbytes for array in node.entry.arrays()}
    return sum(arrays.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evicting", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("round", rounds(3))
def test_the_tree_finds_the_longest_usable_prefix(kind: str, evicting: bool, round: int) -> None:
    """Against a list of everything that was inserted, while nothing is evicted."""
    draw = random.Random(f"{kind} {round}")
    budget = 10**9
    if evicting:
        budget = 6000 if kind == "zoo chunked" else 600  # that one's spare slots are kept too
    cache = PrefixCache(budget)
    limits = {"full": 999, "zoo keys": 999, "window": 6, "zoo window": 5}
    inserted: list[list[int]] = []

    def sequence() -> list[int]:
        return draw.choices(range(3), k=draw.randint(1, 12))

    for _ in range(60):
        tokens = sequence()
        if inserted and draw.random() < 0.5:
            tokens = [*draw.choice(inserted), *sequence()]
        cache.insert(tokens, [make(tokens) for make in KINDS[kind]])
        inserted.append(tokens)
        assert cache.nbytes == held_bytes(cache) <= budget
        assert len(cache) == len(list(cache._tree.root.subtree()))

        prompt = [*draw.choice(inserted), *sequence()][: draw.randint(1, 40)]
        best = 0
        for known in inserted:
            shared = min(preparation.shared_length(known, prompt), len(prompt) - 1)
            trimmable = len(known) <= limits.get(kind, 0)
            if trimmable or shared == len(known):
                best = max(best, shared)
        found = cache.find(prompt)
        if not evicting:
            assert (found[0] if found else 0) == best
        if found is not None:
            length, states = found
            assert 0 < length <= best
            for state, make in zip(states, KINDS[kind], strict=True):
                expected = content(make(prompt[:length]), length)
                if isinstance(state, FullCache):
                    assert state.keys is not None and state.keys.shape[2] == length
                assert content(state, length) == expected
    assert len(cache) > 0


def test_an_entry_that_a_longer_one_serves_is_dropped_and_not_made() -> None:
    cache = PrefixCache(10**9)
    for length in (3, 9, 5):
        cache.insert(list(range(length)), [full_state(list(range(length)))])
    assert len(cache) == 1
    assert cache.nbytes == 2 * 4 * 9


def test_layers_that_can_be_trimmed_are_held_once() -> None:
    cache = PrefixCache(10**9)
    for length in (3, 9, 5):
        tokens = list(range(length))
        cache.insert(tokens, [full_state(tokens), recurrent_state(tokens)])
    assert len(cache) == 3
    assert cache.nbytes == 2 * 4 * 9 + 3 * 4 * 4


def test_the_cheapest_to_compute_again_and_longest_unused_goes_first() -> None:
    def insert(first: int, length: int) -> None:
        tokens = [first] * length
        cache.insert(tokens, [recurrent_state(tokens)])

    def has(first: int, length: int) -> bool:
        found = cache.find([first] * length + [99])
        return found is not None and found[0] == length

    size = 4 * 4
    cache = PrefixCache(3 * size)
    insert(0, 50)
    insert(1, 5)
    insert(2, 20)
    insert(3, 10)  # in place of the one that saves least
    assert [has(0, 50), has(2, 20), has(3, 10)] == [True] * 3
    assert cache.find([1] * 6) is None
    # What is not used goes in the end, however much it saves.
    for first in range(10, 40):
        insert(first, 10)
        assert has(first, 10), "the newest stays"
        assert has(2, 20), "what is used stays"
    assert cache.find([0] * 51) is None
    assert cache.nbytes == 3 * size


def test_branches_of_one_prompt_are_worth_what_they_do_not_share() -> None:
    shared, size = [0] * 20, 21 * 8
    cache = PrefixCache(3 * size)
    for tokens in ([*shared, 1], [*shared, 2], [5] * 21, [6] * 21):
        cache.insert(tokens, [full_state(tokens)])
    for prompt, expected in (([*shared, 9], 20), ([5] * 22, 21), ([6] * 22, 21)):
        found = cache.find(prompt)
        assert found is not None and found[0] == expected
    assert cache.nbytes == 3 * size


def test_states_larger_than_the_budget_are_not_kept_and_push_nothing_out() -> None:
    cache = PrefixCache(100)
    cache.insert([1, 2, 3], [full_state([1, 2, 3])])
    cache.insert([5] * 50, [full_state([5] * 50)])
    assert cache.find([1, 2, 3, 4]) is not None
    assert cache.find([5] * 51) is None


@pytest.mark.parametrize("make", [zoo.KVCache, lambda: zoo.ChunkedKVCache(999)])
def test_what_is_written_in_place_is_not_written_to_an_entry(make: Callable[[], Any]) -> None:
    """A full buffer of 256 tokens, part of which is written again by two who share it."""
    state = fed(make)([1] * 256)
    cache = PrefixCache(10**9)
    cache.insert([1] * 256, [state])
    for _ in range(2):
        state.trim(5)
        feed(state, [7, 7, 7])
        found = cache.find([1] * 257)
        assert found is not None
        (state,) = found[1]
        assert content(state, 256) == [1] * 256


def test_an_entry_keeps_no_more_than_it_counts() -> None:
    """Not the spare slots behind it, nor the batch that a row was taken from."""
    cache = PrefixCache(10**9)

    def full(tokens: int) -> FullCache:
        state = FullCache()
        values = mx.zeros((1, 2, tokens, 4096))
        state.update(values, values)
        state.advance(tokens)
        return state

    before = mx.get_active_memory()
    cache.insert([1], [full(1)])
    rows = FullCache.merge([full(3), full(200)])
    cache.insert([2] * 3, [rows.extract(0)])
    del rows
    mx.eval([array for node in cache._tree.root.subtree() for array in node.entry.arrays()])  # type: ignore[union-attr]
    gc.collect()
    assert cache.nbytes == 4 * 2 * 2 * 4096 * 4
    assert mx.get_active_memory() - before <= cache.nbytes + 2**17


@pytest.mark.parametrize("family", ["open_llama", "recurrent_gemma"])
def test_nothing_is_kept_of_an_answer_that_became_no_number(
    checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Its states have read a token that nobody knows."""
    genuine = Launch.was_broken

    def was_broken(self: Launch, index: int) -> bool:
        row = self.rows[index]
        return genuine(self, index) or (row.request.id == "1" and row.generated == 5)

    monkeypatch.setattr(Launch, "was_broken", was_broken)
    model = checkpoints[family]
    with engine(model) as cached, engine(model, 0) as plain:
        broken = cached.submit(tokens_of(40))
        assert broken.ended.wait(60) and isinstance(broken.end, Failed)
        assert broken.end.code == "invalid_numbers" and len(broken.tokens) == 5
        following = [*tokens_of(40), *broken.tokens, 7]
        plain.ask([1], max_tokens=1)  # so that its request has another number
        assert cached.ask(following).tokens == plain.ask(following).tokens


def test_the_number_of_entries_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_ENTRIES", 4)
    cache = PrefixCache(10**9)
    for first in range(20):
        cache.insert([first], [recurrent_state([first])])
    assert len(cache) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_stays_as_it_was_whatever_reads_on_from_it(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    """Both the states that it was made of and those that it lent are decoded on."""
    loaded = mlxmodels.load(checkpoints[family].path)
    prompt = tokens_of(40)
    states = loaded.make_cache()
    assert can_keep(states)
    loaded.model(mx.array([prompt]), cache=states)
    cache = PrefixCache(10**9)
    cache.insert(prompt, states)

    def snapshot() -> list[bytes]:
        (node,) = cache._tree.root.subtree()
        assert node.entry is not None
        return [bytes(memoryview(array)) for array in node.entry.arrays()]  # type: ignore[arg-type]

    before = snapshot()
    expected = []
    for _ in range(2):
        for id in (1, 2, 3):
            logits = loaded.model(mx.array([[id]]), cache=states)[0, -1]
            expected.append(mx.argmax(logits).item())
        found = cache.find([*prompt, 1])
        assert found is not None and found[0] == 40
        states = found[1]
    assert expected[:3] == expected[3:]
    assert snapshot() == before


def test_what_states_are_taken_apart_and_put_together_with_leaves_no_cycle() -> None:
    """A cycle would keep their arrays until Python happens to look for cycles."""
    states = [zoo.CacheList(zoo.KVCache(), zoo.KVCache()), zoo.KVCache()]
    for leaf in state_leaves.leaves_of(states):
        leaf.update_and_fetch(mx.zeros((1, 1, 3, 4)), mx.zeros((1, 1, 3, 4)))
    gc.collect()
    gc.disable()
    try:
        copies = state_leaves.copied(states, compact=True)
        state_leaves.states_of(state_leaves.leaves_of(copies), states)
        assert gc.collect() == 0
    finally:
        gc.enable()
