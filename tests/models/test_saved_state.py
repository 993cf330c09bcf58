"""Layer states in files: what was saved comes back and goes on as if it had never left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.full_cache import FullCache
from mlxmodels.saved_state import load_states, save_states, saved_metadata

from .conftest import CONFIGS, random_model
from .tiny_states import ZOO, W, arrays_cache, fed, full, noise, recurrent, same, window, zoo

FAMILIES = ["recurrent_gemma", "gemma2", "open_llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(CONFIGS[request.param])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.safetensors"


def logits_of(model: Any, states: list[Any], tokens: mx.array) -> mx.array:
    """Logits of a chunk and of three steps after it."""
    rows = states[0].batch_size
    pieces = [model(mx.concatenate([tokens[:, :6]] * rows), cache=states)]
    pieces += [model(mx.full((rows, 1), 3 + i), cache=states) for i in range(3)]
    return mx.concatenate(pieces, axis=1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(3,), (7,), (30,), (4, 19), (0, 25, 8)])
def test_loaded_states_give_equal_logits(
    name: str, lengths: tuple[int, ...], dtype: mx.Dtype, path: Path, tokens: mx.array
) -> None:
    model = random_model(CONFIGS[name])
    model.set_dtype(dtype)
    rows = []
    for n in lengths:
        rows.append(model.make_cache())
        if n:
            model(tokens[:, :n], cache=rows[-1])
    states = [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]
    save_states(path, states, {"model": "tiny", "tokens": "[5, 7]"})
    loaded, metadata = load_states(path)
    assert metadata == saved_metadata(path) == {"model": "tiny", "tokens": "[5, 7]"}
    assert [type(state) for state in loaded] == [type(state) for state in states]
    assert [state.offsets for state in loaded] == [lengths] * len(states)
    got, want = logits_of(model, loaded, tokens), logits_of(model, states, tokens)
    assert mx.array_equal(got, want) and got.dtype == dtype
    for state in loaded:
        if isinstance(state, RecurrentState):
            assert state.hidden is not None and state.hidden.dtype == mx.float32


@pytest.mark.parametrize("read", [0, 2, 5])
def test_states_are_saved_in_the_middle_of_a_padded_prompt(
    model: Any, read: int, path: Path, tokens: mx.array
) -> None:
    states = model.make_cache()
    model(mx.concatenate([tokens[:, :9], tokens[:, 9:18]]), cache=states)
    for state in states:
        state.prepare(lengths=[7, 3], right_padding=[0, 4])
    if read:
        model(mx.concatenate([tokens[:, :read]] * 2), cache=states)
    save_states(path, states)
    loaded, _ = load_states(path)
    for each in (states, loaded):
        model(mx.concatenate([tokens[:, read:7]] * 2), cache=each)
        for state in each:
            state.finalize()
    assert all(state.offsets == (16, 12) for state in loaded)
    assert mx.array_equal(logits_of(model, loaded, tokens), logits_of(model, states, tokens))


@pytest.mark.parametrize("read", [0, 2, 6])
def test_states_are_saved_before_in_and_after_left_padding(
    model: Any, read: int, path: Path, tokens: mx.array
) -> None:
    states = model.make_cache()
    for state in states:
        state.prepare(left_padding=[0, 5])
    if read:
        model(mx.concatenate([tokens[:, :read], tokens[:, 8 : 8 + read]]), cache=states)
    save_states(path, states)
    loaded, _ = load_states(path)
    assert [state.offsets for state in loaded] == [(read, read - 5)] * len(states)
    assert mx.array_equal(logits_of(model, loaded, tokens), logits_of(model, states, tokens))


def test_a_snapshot_is_saved_as_it_was_taken(model: Any, path: Path, tokens: mx.array) -> None:
    states = model.make_cache()
    model(tokens[:, :20], cache=states)
    snapshot = [(type(state), state.state) for state in states]
    want = logits_of(model, [kind.from_state(state) for kind, state in snapshot], tokens)
    for i in range(20, 30):
        mx.eval(model(tokens[:, i : i + 1], cache=states))
    save_states(path, [kind.from_state(state) for kind, state in snapshot])
    loaded, _ = load_states(path)
    assert mx.array_equal(logits_of(model, loaded, tokens), want)


def test_saving_leaves_the_states_as_they_were(path: Path) -> None:
    states = [recurrent(), window(), full()]
    before = [state.state for state in states]
    save_states(path, states)
    assert same(before, [state.state for state in states])


def test_spare_capacity_is_not_saved(path: Path) -> None:
    cache = full(tokens=3)
    assert cache.keys is not None and cache.keys.shape[2] > 200
    save_states(path, [cache])
    (loaded,), _ = load_states(path)
    assert loaded.keys.shape == loaded.values.shape == (1, 2, 3, 4)
    assert path.stat().st_size < 1000


def test_an_array_is_named_by_its_layer_and_field(path: Path) -> None:
    save_states(path, [recurrent(), window(), full()])
    names = {"0.conv", "0.hidden", "1.keys", "1.values", "2.keys", "2.values"}
    assert set(mx.load(str(path))) == names


def test_no_states_and_empty_ones_are_saved(path: Path) -> None:
    save_states(path, [])
    assert load_states(path) == ([], {})
    pair = FullCache.merge([FullCache(), FullCache()])
    save_states(path, [RecurrentState(), WindowCache(W), pair])
    loaded, _ = load_states(path)
    assert all(state.empty() for state in loaded)
    assert loaded[1].window == W and loaded[2].batch_size == 2


@pytest.mark.parametrize("name", ZOO)
def test_mlx_lm_s_caches_go_on_as_if_never_saved(name: str, path: Path) -> None:
    state = ZOO[name]()
    save_states(path, [full(), state])
    (ours, loaded), _ = load_states(path)
    assert type(loaded) is type(state) and type(ours) is FullCache
    for seed, n in enumerate((1, 1, 4, 1, 9, 1)):
        keys, values = noise(1, 2, n, 64, seed=seed), noise(1, 2, n, 64, seed=9 + seed)
        got, want = loaded.update_and_fetch(keys, values), state.update_and_fetch(keys, values)
        assert same(got, want)


def test_mlx_lm_s_array_caches_and_lists_of_caches_are_saved(path: Path) -> None:
    inner = [arrays_cache(), fed(zoo("KVCache"), 4), window()]
    save_states(path, [zoo("CacheList", *inner), arrays_cache()])
    (listed, arrays), _ = load_states(path)
    assert type(listed) is type(zoo("CacheList")) and type(arrays) is type(inner[0])
    assert same(arrays.state, inner[0].state) and same(listed[0].state, inner[0].state)
    assert same(listed[1].keys_and_values(), inner[1].keys_and_values())
    assert same(listed[2].state, inner[2].state)
    arrays[1] = noise(2, 3)  # what was loaded can be written to


def test_only_classes_of_the_table_are_saved(path: Path) -> None:
    class KVCache:
        state = ()

    class WindowCache:
        state = ()

    class Derived(FullCache):
        pass

    for state in (KVCache(), WindowCache(), Derived(), zoo("BatchKVCache", [0]), None):
        with pytest.raises(
            ValueError, match=rf"expected states of .* got a {type(state).__name__}"
        ):
            save_states(path, [state])
    assert not path.exists()


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    state = recurrent()
    assert state.hidden is not None
    state.hidden = state.hidden.astype(mx.bfloat16)
    with pytest.raises(ValueError, match="hidden: expected float32"):
        save_states(path, [state])
    with pytest.raises(ValueError, match="str to str"):
        save_states(path, [], {"n": 3})  # type: ignore[dict-item]
    assert not path.exists()


def test_our_states_are_saved_without_mlx_lm(path: Path) -> None:
    code = (
        "import sys, mlxmodels.saved_state as s; from mlxmodels.cache import WindowCache;"
        "s.save_states(sys.argv[1], [WindowCache(3)]); s.load_states(sys.argv[1]);"
        "print({'mlx_lm', 'transformers', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
