"""The embedded model through our open-llama port says what mlx-lm's llama says, token for token.

Our port decodes step by step, as the engine does. mlx-lm's model then reads the prompt with our
answer in one pass: if its most likely token is ours after every prefix, its greedy answer is ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import dequantize_model, load_model
from tokenizers import Tokenizer

import mlxmodels

TOKENS = 64

PROMPTS = [
    "<|im_start|>user\nWrite three sentences about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Die Würde des Menschen ist unantastbar. 人は皆、",
]


@pytest.fixture(scope="module")
def smollm2(embedded_home: Path) -> Path:
    return embedded_home / "data" / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def port(smollm2: Path) -> Any:
    return mlxmodels.load(smollm2, dtype=mx.float32).model


@pytest.fixture(scope="module")
def reference(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """mlx-lm's llama on the same files, loaded and expanded by mlx-lm itself."""
    copy = tmp_path_factory.mktemp("as-llama")
    for file in smollm2.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file)
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    model, _ = load_model(copy)
    model.set_dtype(mx.float32)  # scales too, so that expanding them rounds nothing
    model = dequantize_model(model)
    mx.eval(model.parameters())
    shutil.rmtree(copy)
    return model


@pytest.mark.parametrize("prompt", PROMPTS, ids=["chat", "system", "prose", "code", "languages"])
def test_greedy_tokens_equal_mlx_lm(smollm2: Path, port: Any, reference: Any, prompt: str) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids

    cache = port.make_cache()
    step, answer = mx.array([prompt_ids]), []
    for _ in range(TOKENS):
        answer.append(int(port(step, cache=cache)[0, -1].argmax()))
        step = mx.array([answer[-1:]])

    logits = reference(mx.array([prompt_ids + answer[:-1]]))[0, len(prompt_ids) - 1 :]
    assert tokenizer.decode(answer) == tokenizer.decode(logits.argmax(-1).tolist())
    assert answer == logits.argmax(-1).tolist()


def test_mlx_lm_generates_the_same(smollm2: Path, port: Any, reference: Any) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = mx.array(tokenizer.encode(PROMPTS[0]).ids)
    ours, theirs = (
        [token for token, _ in generate_step(ids, model, max_tokens=16)]
        for model in (port, reference)
    )
    assert ours == theirs
