"""Layer states: padded, batched and restored rows are exactly the rows alone."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels.cache import RecurrentState, WindowCache

from ..tolerance import assert_logits_close
from .conftest import CONFIGS, OPEN_LLAMA, RECURRENT_GEMMA, random_model

FAMILIES = ["recurrent_gemma", "gemma2", "open_llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(CONFIGS[request.param])


def prefilled(model: Any, tokens: mx.array, size: int = 16) -> list[Any]:
    """States of one sequence, read in chunks."""
    cache: list[Any] = model.make_cache()
    for i in range(0, tokens.shape[1], size):
        model(tokens[:, i : i + size], cache=cache)
    return cache


def merged(caches: list[list[Any]]) -> list[Any]:
    return [type(states[0]).merge(list(states)) for states in zip(*caches, strict=True)]


def last_alone(model: Any, tokens: mx.array) -> mx.array:
    return model(tokens)[:, -1]


def padded(rows: list[mx.array], *, left: bool) -> mx.array:
    width = max(row.shape[1] for row in rows)
    pads = [mx.full((1, width - row.shape[1]), 3, dtype=row.dtype) for row in rows]
    pairs = zip(pads, rows, strict=True)
    return mx.concatenate([mx.concatenate([p, r] if left else [r, p], axis=1) for p, r in pairs])


# Dynamic logits depend on how much is read at once, so those rows are read in one call here.
@pytest.mark.parametrize(
    ("config", "size"),
    [(config, size) for config in FAMILIES for size in (1, 4, 23, 40)]
    + [("open_llama_dynamic", 40)],
)
def test_left_padded_rows_equal_the_rows_alone(config: str, size: int, tokens: mx.array) -> None:
    model = random_model(CONFIGS[config])
    rows = [tokens, tokens[:, :9], tokens[:, 5:22], tokens[:, :1]]
    padding = [40 - row.shape[1] for row in rows]
    cache = model.make_cache()
    for state in cache:
        state.prepare(left_padding=padding)
    batch = padded(rows, left=True)
    pieces = [model(batch[:, i : i + size], cache=cache) for i in range(0, 40, size)]
    logits = mx.concatenate(pieces, axis=1)
    assert mx.isfinite(logits).all()
    for b, row in enumerate(rows):
        assert_logits_close(f"row {b}", logits[b : b + 1, padding[b] :], model(row))
        assert all(state.offsets[b] == row.shape[1] for state in cache)
    if config != "open_llama_dynamic":
        step = model(tokens[0, :4][:, None], cache=cache)
        for b, row in enumerate(rows):
            alone = last_alone(model, mx.concatenate([row, tokens[:, b : b + 1]], axis=1))
            assert_logits_close(f"next of row {b}", step[b], alone)


@pytest.mark.parametrize("size", [1, 4, 23, 40])
@pytest.mark.parametrize("config", CONFIGS)
def test_right_padded_rows_equal_the_rows_alone(config: str, size: int, tokens: mx.array) -> None:
    model = random_model(CONFIGS[config])
    rows = [tokens, tokens[:, :9], tokens[:, 5:22], tokens[:, :1]]
    lengths = [row.shape[1] for row in rows]
    cache = model.make_cache()
    for state in cache:
        state.prepare(lengths=lengths, right_padding=[40 - n for n in lengths])
    batch = padded(rows, left=False)
    pieces = [model(batch[:, i : i + size], cache=cache) for i in range(0, 40, size)]
    for state in cache:
        state.finalize()
        assert state.offsets == tuple(lengths)
    logits = mx.concatenate(pieces, axis=1)
    assert mx.isfinite(logits).all()
    for b, row in enumerate(rows):
        assert_logits_close(f"row {b}", logits[b : b + 1, : lengths[b]], model(row))
    if config != "open_llama_dynamic":
        step = model(tokens[0, :4][:, None], cache=cache)
        for b, row in enumerate(rows):
            alone = last_alone(model, mx.concatenate([row, tokens[:, b : b + 1]], axis=1))
            assert_logits_close(f"next of row {b}", step[b], alone)


def test_a_second_padded_prompt_continues_each_row(model: Any, tokens: mx.array) -> None:
    first, second = [tokens[:, :10], tokens[:, :3]], [tokens[:, 10:12], tokens[:, 3:25]]
    cache = merged([prefilled(model, row) for row in first])
    lengths = [row.shape[1] for row in second]
    for state in cache:
        state.prepare(lengths=lengths, right_padding=[22 - n for n in lengths])
    logits = model(padded(second, left=False), cache=cache)
    for state in cache:
        state.finalize()
    step = model(tokens[0, :2][:, None], cache=cache)
    for b in range(2):
        whole = mx.concatenate([first[b], second[b]], axis=1)
        want = model(whole)[:, first[b].shape[1] :]
        assert_logits_close(f"row {b}", logits[b : b + 1, : lengths[b]], want)
        alone = last_alone(model, mx.concatenate([whole, tokens[:, b : b + 1]], axis=1))
        assert_logits_close(f"next of row {b}", step[b], alone)


def test_rows_join_and_leave_while_others_decode(model: Any, tokens: mx.array) -> None:
    texts = {name: tokens[:, :n] for name, n in zip("abcde", (30, 2, 7, 8, 19), strict=True)}
    alive: list[str] = []
    cache: list[Any] = []
    fresh = 0

    def step() -> None:
        nonlocal fresh
        fresh = (fresh + 11) % 90
        new = mx.array([[2 + (fresh + 7 * i) % 90] for i in range(len(alive))])
        logits = model(new, cache=cache)
        for i, name in enumerate(alive):
            texts[name] = mx.concatenate([texts[name], new[i : i + 1]], axis=1)
            assert_logits_close(name, logits[i], last_alone(model, texts[name]))

    def join(*names: str) -> None:
        rows = merged([prefilled(model, texts[name], size=5) for name in names])
        for old, new in zip(cache, rows, strict=False):
            old.extend(new)
        cache[len(cache) :] = rows if not cache else []
        alive.extend(names)

    def keep(*names: str) -> None:
        for state in cache:
            state.filter([alive.index(name) for name in names])
        alive[:] = names

    join("a")
    step()
    join("b", "c")
    for _ in range(3):
        step()
    keep("c", "a")
    step()
    join("d")
    step()
    keep("d", "c")
    for _ in range(20):  # past three windows
        step()
    alone = [state.extract(1) for state in cache]
    assert all(state.offsets == (texts["c"].shape[1],) for state in alone)
    join("e")
    step()
    cache[:], alive[:] = alone, ["c"]
    texts["c"] = texts["c"][:, :-1]  # it was taken out one step earlier
    step()


def test_an_empty_state_joins_a_batch(model: Any, tokens: mx.array) -> None:
    cache = merged([prefilled(model, tokens[:, :9]), model.make_cache()])
    logits = model(tokens[0, :2][:, None], cache=cache)
    assert_logits_close("new row", logits[1], last_alone(model, tokens[:, 1:2]))
    everyone = merged([model.make_cache(), model.make_cache()])
    logits = model(mx.concatenate([tokens[:, :9], tokens[:, 9:18]]), cache=everyone)
    assert_logits_close("row 1", logits[1:], model(tokens[:, 9:18]))


def test_a_restored_state_continues_equally(model: Any, tokens: mx.array) -> None:
    cache = merged([prefilled(model, tokens[:, :19]), prefilled(model, tokens[:, :4])])
    restored = [type(state).from_state(state.state) for state in cache]
    copied = copy.deepcopy(cache)
    next_tokens = tokens[0, :2][:, None]
    want = model(next_tokens, cache=cache)
    for other in (restored, copied):
        assert mx.array_equal(model(next_tokens, cache=other), want)


def test_a_snapshot_does_not_change_when_its_source_goes_on(model: Any, tokens: mx.array) -> None:
    cache = prefilled(model, tokens[:, :19])
    snapshots = [
        [type(state).from_state(state.state) for state in cache],
        [state.extract(0) for state in cache],
        merged([cache]),
    ]
    want = model(tokens[:, 19:20], cache=cache)
    for _ in range(3):
        mx.eval(model(tokens[:, :8], cache=cache))
    for snapshot in snapshots:
        assert_logits_close("snapshot", model(tokens[:, 19:20], cache=snapshot), want)


def test_branches_of_one_state_do_not_see_each_other(model: Any, tokens: mx.array) -> None:
    cache = prefilled(model, tokens[:, :19])
    branch = [type(state).from_state(state.state) for state in cache]
    for i in range(19, 24):  # in turns: each writes where the other has just written
        model(tokens[:, i : i + 1], cache=cache)
        model(tokens[:, i + 10 : i + 11], cache=branch)
    other = mx.concatenate([tokens[:, :19], tokens[:, 29:34]], axis=1)
    for text, states in ((tokens[:, :24], cache), (other, branch)):
        alone = last_alone(model, mx.concatenate([text, tokens[:, :1]], axis=1))
        assert_logits_close("branch", model(tokens[:, :1], cache=states)[:, -1], alone)


@pytest.mark.parametrize("size", [1, 3])
def test_padding_leaves_a_row_s_state_as_it_was_to_the_bit(size: int, tokens: mx.array) -> None:
    model = random_model(RECURRENT_GEMMA)
    cache = merged([prefilled(model, tokens[:, :20]), prefilled(model, tokens[:, :9])])
    before = [state.extract(1).state for state in cache]
    for state in cache:
        state.prepare(lengths=[6, 0], right_padding=[0, 6])
    for i in range(0, 6, size):
        model(mx.concatenate([tokens[:, i : i + size]] * 2), cache=cache)
    for state, old in zip(cache, before, strict=True):
        state.finalize()
        for now, then in zip(state.extract(1).state, old, strict=True):
            same = mx.array_equal(now, then) if isinstance(now, mx.array) else now == then
            assert same, type(state).__name__


@pytest.mark.parametrize("size", [1, 4])
def test_left_padding_writes_no_key_into_a_ring(size: int, tokens: mx.array) -> None:
    model = random_model(RECURRENT_GEMMA)
    cache = model.make_cache()
    for state in cache:
        state.prepare(left_padding=[0, 4])
    batch = mx.concatenate([tokens[:, :4], tokens[:, 4:8]])
    for i in range(0, 4, size):
        model(batch[:, i : i + size], cache=cache)
    for state in cache:
        if isinstance(state, WindowCache):
            assert state.keys is not None and not mx.any(state.keys[1]).item()
            assert mx.any(state.keys[0]).item()


def test_states_measure_themselves(model: Any, tokens: mx.array) -> None:
    cache = model.make_cache()
    assert all(state.empty() and state.nbytes == 0 and state.offset == 0 for state in cache)
    model(tokens, cache=cache)
    assert all(not state.empty() and state.offset == 40 for state in cache)
    for state in cache:
        arrays = [v for v in state.state if isinstance(v, mx.array)]
        assert state.nbytes == sum(array.nbytes for array in arrays) > 0


def test_recurrent_gemma_needs_no_more_memory_past_the_window(tokens: mx.array) -> None:
    model = random_model(RECURRENT_GEMMA)
    cache = prefilled(model, tokens[:, :8])
    before = sum(state.nbytes for state in cache)
    for _ in range(5):
        model(tokens, cache=cache)
    assert sum(state.nbytes for state in cache) == before
    rings = [state for state in cache if isinstance(state, WindowCache)]
    assert rings and all(ring.keys is not None and ring.keys.shape[2] == 7 for ring in rings)
    assert all(ring.size() == 7 for ring in rings)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_recurrent_state_is_float32_whatever_the_weights(
    dtype: mx.Dtype, tokens: mx.array
) -> None:
    model = random_model(RECURRENT_GEMMA)
    model.set_dtype(dtype)
    cache = merged([model.make_cache(), prefilled(model, tokens), prefilled(model, tokens[:, :2])])
    for state in cache:
        state.extend(state.extract(1))
        state.filter([3, 0])
    logits = model(mx.concatenate([tokens[:, :1]] * 2), cache=cache)
    assert logits.dtype == dtype and mx.isfinite(logits).all()
    for state in cache:
        if isinstance(state, RecurrentState):
            assert state.hidden is not None and state.hidden.dtype == mx.float32
            assert state.conv is not None and state.conv.dtype == dtype
        else:
            assert state.keys.dtype == dtype


@pytest.mark.parametrize("n", [0, 1, 6])
def test_a_trimmed_full_cache_continues_from_there(n: int, tokens: mx.array) -> None:
    model = random_model(OPEN_LLAMA)
    cache = prefilled(model, tokens[:, :20])
    assert all(state.is_trimmable() and state.trim(n) == n for state in cache)
    logits = model(tokens[:, 30:31], cache=cache)
    text = mx.concatenate([tokens[:, : 20 - n], tokens[:, 30:31]], axis=1)
    assert_logits_close("next", logits[:, -1], last_alone(model, text))


def test_a_window_can_be_trimmed_only_before_it_wraps(tokens: mx.array) -> None:
    model = random_model(RECURRENT_GEMMA | {"block_types": ["attention"]})
    cache = prefilled(model, tokens[:, :6])
    assert all(state.trim(2) == 2 for state in cache)
    logits = model(tokens[:, 30:31], cache=cache)
    text = mx.concatenate([tokens[:, :4], tokens[:, 30:31]], axis=1)
    assert_logits_close("next", logits[:, -1], last_alone(model, text))
    model(tokens[:, :3], cache=cache)
    assert not any(state.is_trimmable() or state.trim(1) for state in cache)
