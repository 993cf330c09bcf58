"""What we say of mlx-lm's batches, shown on mlx-lm itself: no code of ours runs here.

`docs/upstream.md` has the reproduction. The cause: rows are padded on the right while their prompts
are read, and the padding enters RecurrentGemma's convolution and recurrence. Llama is the control:
the same calls, and every row is what it is alone.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from ..tiny_models import LLAMA

GRIFFIN: dict[str, Any] = {
    "model_type": "recurrent_gemma",
    "attention_bias": False,
    "conv1d_width": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "logits_soft_cap": 30.0,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "attention_window_size": 8,
    "vocab_size": 97,
    "block_types": ["recurrent", "recurrent", "attention"],
}
PROMPTS = [list(range(5, end)) for end in (8, 15, 30)]


def rows_equal_to_those_alone(config: dict[str, Any]) -> list[bool]:
    """For each prompt: whether mlx-lm answers it in a batch as it does alone, greedily."""
    from mlx_lm.generate import BatchGenerator

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(0)
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.3, model.parameters()))

    def answers(prompts: list[list[int]]) -> list[list[int]]:
        generator = BatchGenerator(model, max_tokens=12)
        tokens: dict[int, list[int]] = {row: [] for row in generator.insert(prompts)}
        while responses := generator.next_generated():
            for response in responses:
                tokens[response.uid].append(response.token)
        assert all(len(given) == 12 for given in tokens.values())
        return list(tokens.values())

    together = answers(PROMPTS)
    return [row == answers([prompt])[0] for row, prompt in zip(together, PROMPTS, strict=True)]


def test_mlx_lm_answers_padded_rows_of_recurrent_gemma_otherwise_than_alone() -> None:
    assert rows_equal_to_those_alone(LLAMA) == [True, True, True]
    short, middle, longest = rows_equal_to_those_alone(GRIFFIN)
    assert longest, "the row without padding differs too: this is another fault than the known one"
    if short and middle:
        pytest.skip(
            f"mlx-lm {version('mlx-lm')} answers batches of RecurrentGemma correctly: take back "
            "what README and docs/upstream.md say of it, and delete this file"
        )
