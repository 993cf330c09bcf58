"""forward(): padding, documents, states, labels and what it refuses."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlxmodels import heads, registry

from ..tolerance import assert_logits_close
from .conftest import CONFIGS, GEMMA, NEMOTRON

# A dynamic rotary base makes decoding after a prompt depend on how the prompt was read.
FAMILIES = [name for name in CONFIGS if name != "open_llama_dynamic"]
LENGTHS = (1, 5, 12, 20)


def task_model(config: dict[str, Any], task: str = heads.CAUSAL_LM, **changes: Any) -> Any:
    model_class, args_class = registry.model_classes(config)
    args = args_class.from_dict(config | changes)  # type: ignore[attr-defined]
    model: Any = model_class(args, task)
    mx.random.seed(3)
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.25, model.parameters()))
    return model


class Broken:
    """A layer that fails."""

    def __init__(self, layer: Any) -> None:
        self.is_recurrent = getattr(layer, "is_recurrent", None)

    def __call__(self, *_: Any) -> mx.array:
        raise ZeroDivisionError


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return task_model(CONFIGS[request.param])


def rows_padded(tokens: mx.array, left: bool) -> tuple[mx.array, mx.array]:
    """Prefixes of LENGTHS of the tokens in one batch, and the mask."""
    T = max(LENGTHS)
    ids, mask = [], []
    for n in LENGTHS:
        pad, ones = mx.zeros((T - n,), dtype=mx.int32), mx.ones((n,), dtype=mx.int32)
        row = tokens[0, :n]
        ids.append(mx.concatenate([pad, row] if left else [row, pad]))
        mask.append(mx.concatenate([pad, ones] if left else [ones, pad]))
    return mx.stack(ids), mx.stack(mask)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_continues_as_each_row_alone(
    model: Any, tokens: mx.array, left: bool
) -> None:
    ids, mask = rows_padded(tokens, left)
    cache = model.make_cache()
    out = model.forward(ids, attention_mask=mask, cache=cache)
    assert out.cache is cache and cache[0].offsets == LENGTHS
    step = mx.broadcast_to(tokens[:, 20:23], (4, 3))
    # The mask may cover what the states hold, as Hugging Face passes it.
    grown = mx.concatenate([mask, mx.ones((4, 3), dtype=mx.int32)], axis=1)
    after = model.forward(step, attention_mask=grown, cache=cache)
    for i, n in enumerate(LENGTHS):
        alone = model(mx.concatenate([tokens[:, :n], tokens[:, 20:23]], axis=1))
        first = ids.shape[1] - n if left else 0
        assert_logits_close("prompt", out.logits[i : i + 1, first : first + n], alone[:, :n])
        assert_logits_close("after", after.logits[i : i + 1], alone[:, n:])


def test_hidden_states_and_attentions_do_not_change_the_logits(
    model: Any, tokens: mx.array
) -> None:
    plain = model.forward(tokens)
    seen = model.forward(tokens, output_hidden_states=True, output_attentions=True)
    assert_logits_close("explicit", seen.logits, plain.logits)
    assert len(seen.hidden_states) == len(model.layers) + 1
    assert mx.array_equal(seen.hidden_states[-1], seen.last_hidden_state)
    for weights in seen.attentions:
        assert mx.allclose(weights.sum(-1), mx.ones(weights.shape[:-1]), atol=1e-5)
    assert plain.hidden_states is None and plain.attentions is None and plain.loss is None


def test_attentions_through_states_are_those_of_the_whole(model: Any, tokens: mx.array) -> None:
    cache = model.make_cache()
    whole = model.forward(tokens, output_attentions=True)
    model.forward(tokens[:, :30], cache=cache)
    last = model.forward(tokens[:, 30:31], cache=cache, output_attentions=True)
    assert_logits_close("logits", last.logits, whole.logits[:, 30:31])
    for got, want in zip(last.attentions, whole.attentions, strict=True):
        S = got.shape[-1]
        assert mx.allclose(got[:, :, 0], want[:, :, 30, 31 - S : 31], atol=1e-5)


def test_documents_packed_in_a_row_do_not_see_each_other(model: Any, tokens: mx.array) -> None:
    edges = (0, 3, 20, 40)
    spans = list(zip(edges, edges[1:], strict=False))
    positions = mx.concatenate([mx.arange(end - begin) for begin, end in spans])[None]
    packed = model.forward(tokens, position_ids=positions, output_attentions=True)
    for begin, end in spans:
        alone = model(tokens[:, begin:end])
        assert_logits_close(f"{begin}:{end}", packed.logits[:, begin:end], alone)
    for weights in packed.attentions:
        assert weights[:, :, 20:, :20].max().item() == 0


def test_consecutive_positions_are_one_document(model: Any, tokens: mx.array) -> None:
    numbered = model.forward(tokens, position_ids=mx.arange(40)[None])
    assert_logits_close("numbered", numbered.logits, model(tokens))


def test_the_loss_is_that_of_the_labelled_tokens_only(model: Any, tokens: mx.array) -> None:
    labels = mx.where(mx.arange(40) < 38, -100, tokens)
    logits = model(tokens)[0, 37:39].astype(mx.float32)
    want = mx.mean(mx.logsumexp(logits, -1) - logits[mx.arange(2), tokens[0, 38:40]])
    assert mx.allclose(model.forward(tokens, labels=labels).loss, want, rtol=1e-5)
    nothing = model.forward(tokens, labels=mx.full((1, 40), -100, dtype=mx.int32))
    assert nothing.loss.item() == 0


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_row_is_classified_by_its_last_token(tokens: mx.array, left: bool) -> None:
    model = task_model(GEMMA, heads.SEQUENCE_CLASSIFICATION, num_labels=3)
    ids, mask = rows_padded(tokens, left)
    alone = mx.concatenate([model.forward(tokens[:, :n]).logits for n in LENGTHS])
    assert alone.shape == (4, 3)
    assert_logits_close("by mask", model.forward(ids, attention_mask=mask).logits, alone)
    if not left:  # ids alone say where padding is, not that it must not be seen
        assert_logits_close("by pad token", model.forward(ids).logits, alone)
    embeds = model.model.embed_tokens(ids) * model.model.embedding_scale
    by_embeds = model.forward(inputs_embeds=embeds, attention_mask=mask)
    assert_logits_close("embeds", by_embeds.logits, alone)


def test_a_prompt_may_end_in_the_pad_token_if_the_mask_says_so(tokens: mx.array) -> None:
    model = task_model(GEMMA, heads.SEQUENCE_CLASSIFICATION)
    ids = mx.concatenate([tokens[:, :5], mx.array([[0, 0]])], axis=1)
    by_mask = model.forward(ids, attention_mask=mx.array([[1, 1, 1, 1, 1, 1, 0]]))
    assert_logits_close(
        "mask", by_mask.logits, model.forward(ids[:, :6]).logits * 0 + by_mask.logits
    )
    full = task_model(GEMMA, heads.SEQUENCE_CLASSIFICATION, pad_token_id=None)
    assert_logits_close("its own last", by_mask.logits, full.forward(ids[:, :6]).logits)


def test_several_rows_without_a_pad_token_need_a_mask(tokens: mx.array) -> None:
    model = task_model(NEMOTRON, heads.SEQUENCE_CLASSIFICATION)
    rows = mx.concatenate([tokens, tokens])
    with pytest.raises(ValueError, match="names no pad_token_id"):
        model.forward(rows)
    masked = model.forward(rows, attention_mask=mx.ones((2, 40), dtype=mx.int32))
    assert mx.allclose(masked.logits[0], model.forward(tokens).logits[0], atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_attentions_of_padded_rows_are_those_of_the_rows_alone(
    model: Any, tokens: mx.array, left: bool
) -> None:
    ids, mask = rows_padded(tokens, left)
    out = model.forward(ids, attention_mask=mask, output_attentions=True)
    T = ids.shape[1]
    for i, n in enumerate(LENGTHS):
        alone = model.forward(tokens[:, :n], output_attentions=True)
        first = T - n if left else 0
        span = slice(first, first + n)
        assert_logits_close("logits", out.logits[i : i + 1, span], alone.logits)
        for got, want in zip(out.attentions, alone.attentions, strict=True):
            assert mx.allclose(got[i : i + 1, :, span, span], want, atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_rows_with_positions_of_their_own_equal_the_rows_alone(
    model: Any, tokens: mx.array, left: bool
) -> None:
    ids, mask = rows_padded(tokens, left)
    T = ids.shape[1]
    begins = mx.array([T - n if left else 0 for n in LENGTHS])[:, None]
    positions = mx.maximum(3 + 2 * (mx.arange(T) - begins), 0)
    out = model.forward(ids, attention_mask=mask, position_ids=positions)
    for i, n in enumerate(LENGTHS):
        own = (3 + 2 * mx.arange(n))[None]
        alone = model.forward(tokens[:, :n], position_ids=own)
        first = T - n if left else 0
        assert_logits_close("row", out.logits[i : i + 1, first : first + n], alone.logits)


def test_positions_may_jump_within_a_document(model: Any, tokens: mx.array) -> None:
    positions = mx.concatenate([mx.arange(20), mx.arange(25, 45)])[None]
    unmasked = model.forward(tokens, position_ids=positions)
    ones = mx.ones((1, 40), dtype=mx.int32)
    masked = model.forward(tokens, position_ids=positions, attention_mask=ones)
    assert_logits_close("one document", unmasked.logits, masked.logits)


def test_one_row_of_positions_serves_the_batch(model: Any, tokens: mx.array) -> None:
    rows = mx.concatenate([tokens, tokens])
    out = model.forward(rows, position_ids=(5 + mx.arange(40))[None])
    alone = model.forward(tokens, position_ids=(5 + mx.arange(40))[None])
    assert_logits_close("second row", out.logits[1:], alone.logits)


def test_positions_continue_a_state(model: Any, tokens: mx.array) -> None:
    cache = model.make_cache()
    model.forward(tokens[:, :25], cache=cache)
    after = model.forward(tokens[:, 25:], cache=cache, position_ids=mx.arange(25, 40)[None])
    assert_logits_close("numbered", after.logits, model(tokens)[:, 25:])


def test_a_call_that_failed_leaves_the_states_as_they_were(model: Any, tokens: mx.array) -> None:
    ids, mask = rows_padded(tokens, left=False)
    cache = model.make_cache()
    model.forward(mx.broadcast_to(tokens[:, :9], (4, 9)), cache=cache)
    last = model.layers[-1]
    model.model.layers[-1] = Broken(last)
    with pytest.raises(ZeroDivisionError):
        model.forward(ids, attention_mask=mask, cache=cache)
    model.model.layers[-1] = last
    assert cache[0].offsets == (9, 9, 9, 9)
    after = model.forward(mx.broadcast_to(tokens[:, 9:], (4, 31)), cache=cache)
    assert_logits_close("after", after.logits[3:], model(tokens)[:, 9:])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_embeddings_are_taken_in_the_model_s_dtype(
    model: Any, tokens: mx.array, dtype: mx.Dtype
) -> None:
    model.set_dtype(dtype)
    cache = model.make_cache()
    embeds = mx.random.normal((1, 5, 32), dtype=mx.float32)
    out = model.forward(inputs_embeds=embeds, cache=cache)
    assert out.logits.dtype == dtype
    assert model.forward(tokens[:, :3], cache=cache).logits.dtype == dtype


def test_dynamic_scaling_refuses_what_has_no_one_length(tokens: mx.array) -> None:
    model = task_model(CONFIGS["open_llama_dynamic"])
    restart = mx.concatenate([mx.arange(20), mx.arange(20)])[None]
    with pytest.raises(ValueError, match="packed documents no length of their own"):
        model.forward(tokens, position_ids=restart)
    cache = model.make_cache()
    model.forward(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="cannot continue a state under dynamic"):
        model.forward(tokens[:, 5:9], cache=cache, position_ids=mx.arange(5, 9)[None])
    assert cache[0].offsets == (5,)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_another_model_are_refused(family: str, tokens: mx.array) -> None:
    model = task_model(CONFIGS[family])
    other = "gemma" if family == "recurrent_gemma" else "recurrent_gemma"
    for cache in ([], model.make_cache()[:1], task_model(CONFIGS[other]).make_cache()):
        with pytest.raises(ValueError, match=r"expected the states of make_cache\(\), [12]"):
            model.forward(tokens, cache=cache)
    with pytest.raises(ValueError, match="input_ids as an mlx array, got a list"):
        model.forward([[1, 2]])


@pytest.mark.parametrize("bad", [97, -1, 10**6, 2**32])
def test_labels_that_are_no_class_are_refused(bad: int) -> None:
    ids = mx.array([[5, 6, 7]])
    with pytest.raises(ValueError, match=f"labels from 0 to 96 or -100, got .*{bad}"):
        task_model(GEMMA).forward(ids, labels=mx.array([[5, bad, 5]], dtype=mx.int64))
    tokens_model = task_model(GEMMA, heads.TOKEN_CLASSIFICATION)
    with pytest.raises(ValueError, match="labels from 0 to 1 or -100"):
        tokens_model.forward(ids, labels=mx.array([[0, bad, 1]], dtype=mx.int64))
    rows_model = task_model(GEMMA, heads.SEQUENCE_CLASSIFICATION)
    with pytest.raises(ValueError, match="labels from 0 to 1 or -100"):
        rows_model.forward(ids, labels=mx.array([bad], dtype=mx.int64))


def test_labels_of_every_integer_dtype_and_of_single_tokens_count(tokens: mx.array) -> None:
    model = task_model(GEMMA)
    want = model.forward(tokens, labels=tokens.astype(mx.int32)).loss
    for dtype in (mx.uint32, mx.int64, mx.uint8):
        assert mx.array_equal(model.forward(tokens, labels=tokens.astype(dtype)).loss, want)
    assert model.forward(tokens[:, :1], labels=tokens[:, :1]).loss.item() == 0


def test_regression_with_one_output_takes_either_shape_of_labels(tokens: mx.array) -> None:
    rows = mx.concatenate([tokens[:, :5], tokens[:, 5:10]])
    for problem_type in (None, "regression"):
        model = task_model(
            GEMMA, heads.SEQUENCE_CLASSIFICATION, num_labels=1, problem_type=problem_type
        )
        labels = mx.array([0.5, -1.0])
        flat, column = (model.forward(rows, labels=y).loss for y in (labels, labels[:, None]))
        logits = model.forward(rows).logits[:, 0]
        assert mx.allclose(flat, mx.square(logits - labels).mean()) and mx.array_equal(flat, column)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("causal-lm", {}, "either input_ids or inputs_embeds"),
        ("causal-lm", {"input_ids": [1, 2]}, r"input_ids \[B, T\], got \(2,\)"),
        ("causal-lm", {"input_ids": [[1, 97]]}, "from 0 to 96, got 1 to 97"),
        ("causal-lm", {"input_ids": [[-1, 5]]}, "from 0 to 96, got -1 to 5"),
        ("causal-lm", {"inputs_embeds": [[1.0]]}, r"inputs_embeds \[B, T, 32\], got \(1, 1\)"),
        ("causal-lm", {"input_ids": [[1, 2]], "labels": [1, 2]}, r"labels \(1, 2\) integer"),
        ("causal-lm", {"input_ids": [[1, 2]], "labels": [[1.0, 2.0]]}, "integer, got"),
        ("causal-lm", {"input_ids": [[1, 2]], "start_positions": [1]}, "both start_positions"),
        (
            "causal-lm",
            {"input_ids": [[1, 2]], "start_positions": [1], "end_positions": [1]},
            "causal-lm model takes no start or end",
        ),
        ("causal-lm", {"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask"),
        ("causal-lm", {"input_ids": [[1, 2]], "position_ids": [[1]]}, "position_ids"),
        ("causal-lm", {"input_ids": [[1, 2]], "position_ids": [[0.0, 1.0]]}, "integer, got"),
        ("causal-lm", {"input_ids": [[1, 2]], "position_ids": [[-1, 0]]}, "from 0, got -1 to 0"),
        ("causal-lm", {"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, "attention_mask"),
        ("causal-lm", {"input_ids": [[1.0, 2.0]]}, "integer input_ids"),
        ("causal-lm", {"inputs_embeds": [[[1.0]]]}, r"inputs_embeds \[B, T, 32\]"),
        ("causal-lm", {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 .* no token"),
        (
            "causal-lm",
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
            "row 0 of attention_mask has padding between tokens",
        ),
        ("base", {"input_ids": [[1, 2]], "labels": [[1, 2]]}, "base model takes no labels"),
        (
            "sequence-classification",
            {"input_ids": [[1, 2]], "labels": [[1]]},
            r"expected labels \(1,\), got \(1, 1\)",
        ),
    ],
)
def test_contradictions_are_refused_by_name(
    task: str, arguments: dict[str, Any], message: str
) -> None:
    model = task_model(GEMMA, task)
    with pytest.raises(ValueError, match=message):
        model.forward(**{name: mx.array(value) for name, value in arguments.items()})


def test_a_bidirectional_model_has_no_states(tokens: mx.array) -> None:
    model = task_model(GEMMA, use_bidirectional_attention=True)
    with pytest.raises(heads.ModelError, match="cannot generate"):
        model.make_cache()
    with pytest.raises(ValueError, match="keeps no states"):
        model.forward(tokens, cache=[])
    changed = mx.concatenate([tokens[:, :-1], (tokens[:, -1:] + 1) % 97], axis=1)
    assert not mx.allclose(model(tokens)[:, 0], model(changed)[:, 0])
