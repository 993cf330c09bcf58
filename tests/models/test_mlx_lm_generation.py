"""Our models and their states in mlx-lm's own generators: each row gets the tokens it gets alone.

Nothing had to be left out: `BatchGenerator`, `stream_generate`, speculative decoding and the
server's `LRUPromptCache` need only the protocol. What mlx-lm cannot do is save our states: its
`load_prompt_cache` looks classes up among its own, hence `mlxmodels.saved_state`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, stream_generate
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache
from transformers import PreTrainedTokenizerFast

from mlxmodels.saved_state import load_states, save_states

from .conftest import CONFIGS, byte_tokenizer, random_model


@pytest.fixture(scope="module", params=["recurrent_gemma", "gemma2", "open_llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    # Without an end-of-text token nothing stops before max_tokens.
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())


@pytest.fixture
def prompts(tokens: mx.array) -> list[list[int]]:
    return [tokens[0, :n].tolist() for n in (17, 3, 25, 9, 1)]


def alone(model: Any, text: list[int], n: int) -> list[int]:
    """n greedy tokens after a text, each from the whole text so far."""
    text = list(text)
    for _ in range(n):
        text.append(int(model(mx.array([text]))[0, -1].argmax().item()))
    return text[len(text) - n :]


def finish(generator: BatchGenerator, produced: dict[int, list[int]]) -> dict[int, Any]:
    """Run until every row has ended; returns the rows' last responses."""
    ended = {}
    while responses := generator.next_generated():
        for response in responses:
            produced.setdefault(response.uid, []).append(response.token)
            if response.finish_reason:
                ended[response.uid] = response
    return ended


@pytest.mark.parametrize("own_caches", [False, True])
def test_a_batch_of_unequal_prompts_and_ends(
    model: Any, prompts: list[list[int]], own_caches: bool
) -> None:
    generator = BatchGenerator(model, prefill_step_size=8)
    counts = [6, 20, 1, 12, 9]
    caches = [model.make_cache() for _ in prompts] if own_caches else None
    uids = generator.insert(prompts, counts, caches=caches)
    produced: dict[int, list[int]] = {}
    finish(generator, produced)
    for uid, prompt, n in zip(uids, prompts, counts, strict=True):
        assert produced[uid] == alone(model, prompt, n)


def test_rows_join_and_are_removed_while_others_decode(
    model: Any, prompts: list[list[int]]
) -> None:
    generator = BatchGenerator(model, prefill_step_size=4, completion_batch_size=3)
    first = generator.insert(prompts[:2], [12, 12])
    produced: dict[int, list[int]] = {}
    for _ in range(4):
        for response in generator.next_generated():
            produced.setdefault(response.uid, []).append(response.token)
    later = generator.insert(prompts[2:], [10] * 3)
    generator.next_generated()
    generator.remove([first[0]])
    produced.pop(first[1])
    finish(generator, produced)
    for uid, prompt in zip(later, prompts[2:], strict=True):
        assert produced[uid] == alone(model, prompt, 10)
    last = alone(model, prompts[1], 12)
    assert produced[first[1]] == last[len(last) - len(produced[first[1]]) :]


def test_returned_states_are_taken_up_in_the_next_batch(
    model: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    generator = BatchGenerator(model)
    uids = generator.insert(prompts, [3, 9, 5, 1, 4])
    ended = finish(generator, {})
    caches = []
    for uid in uids:  # histories of unequal lengths, from files
        path = tmp_path / f"{uid}.safetensors"
        save_states(path, ended[uid].prompt_cache)
        caches.append(load_states(path)[0])
    turn = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [20] * 5]
    generator = BatchGenerator(model, prefill_step_size=4)
    again = generator.insert(turn, [6] * 5, caches=caches)
    produced: dict[int, list[int]] = {}
    finish(generator, produced)
    for uid, new, prompt in zip(uids, again, turn, strict=True):
        assert produced[new] == alone(model, list(ended[uid].all_tokens) + prompt, 6)


def test_batch_generate(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    answer = batch_generate(
        model,
        TokenizerWrapper(tokenizer),
        prompts,
        prompt_caches=[model.make_cache() for _ in prompts],
        max_tokens=5,
        return_token_ids=True,
        return_prompt_caches=True,
    )
    assert answer.token_ids == [alone(model, prompt, 5) for prompt in prompts]
    assert len(answer.caches) == len(prompts)


def test_stream_generate_goes_on_from_a_prompt_cache(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    cache = model.make_cache()
    read: list[int] = []
    for prompt in prompts[:3]:
        got = [
            response.token
            for response in stream_generate(
                model, tokenizer, prompt, max_tokens=4, prompt_cache=cache, prefill_step_size=6
            )
        ]
        assert got == alone(model, read + prompt, 4)
        read = read + prompt + got
        assert {state.offset for state in cache} == {len(read)}
    assert [type(state) for state in make_prompt_cache(model)] == [type(state) for state in cache]


@pytest.mark.parametrize("seed", [0, 1])
def test_speculative_decoding_gives_the_same_tokens(
    tokenizer: Any, prompts: list[list[int]], seed: int
) -> None:
    model, draft = (random_model(CONFIGS["open_llama"], seed=s) for s in (0, seed))
    got = [
        response.token
        for response in stream_generate(
            model, tokenizer, prompts[0], max_tokens=12, draft_model=draft, num_draft_tokens=3
        )
    ]
    assert got == alone(model, prompts[0], 12)


def test_a_recurrence_is_refused_for_speculative_decoding(
    tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = random_model(CONFIGS["recurrent_gemma"])
    assert not can_trim_prompt_cache(model.make_cache())
    with pytest.raises(ValueError, match="trimmable prompt cache"):
        next(stream_generate(model, tokenizer, prompts[0], draft_model=model))


def test_mlx_lm_s_prompt_store_keeps_our_states(model: Any, tokens: mx.array) -> None:
    text = tokens[0].tolist()
    cache = model.make_cache()
    model(tokens[:, :20], cache=cache)
    store = LRUPromptCache()
    store.insert_cache("model", text[:20], cache)
    assert store.nbytes == sum(state.nbytes for state in cache)
    found, rest = store.fetch_nearest_cache("model", text[:30])
    assert rest == text[20:30]
    assert (
        int(model(mx.array([rest]), cache=found)[0, -1].argmax().item())
        == (alone(model, text[:30], 1)[0])
    )
    shorter = text[:12] + [3]
    found, rest = store.fetch_nearest_cache("model", shorter)
    if can_trim_prompt_cache(cache):
        assert rest == [3] and {state.offset for state in found} == {12}
        assert (
            int(model(mx.array([rest]), cache=found)[0, -1].argmax().item())
            == (alone(model, shorter, 1)[0])
        )
    else:
        assert found is None and rest == shorter
