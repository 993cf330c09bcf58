"""`python -m mlxmodels PATH` says what a directory holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmodels.__main__ import describe, main

from .conftest import CONFIGS, flat, random_model, write_checkpoint


def saved(path: Path, config: dict[str, Any], **extra: mx.array) -> Path:
    return write_checkpoint(path / "model", config, flat(random_model(config)) | extra)


def test_a_griffin_is_described_in_full(tmp_path: Path) -> None:
    path = saved(tmp_path, CONFIGS["recurrent_gemma"])
    command = [sys.executable, "-m", "mlxmodels", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said = {line[:13].strip(): line[14:] for line in lines}
    count = sum(w.size for w in flat(random_model(CONFIGS["recurrent_gemma"])).values())
    assert said["family"] == "recurrent_gemma (own port)"
    assert said["parameters"] == f"{count:,}" and f"{4 * count:,} bytes" in said["weights"]
    assert said["layers"] == "2 recurrent, 2 attention to 7 tokens"
    # Two rings of 7 keys and values of one head of 8; two tails of 3 and states of 32 channels.
    fixed = 4 * (2 * 2 * 7 * 8 + 2 * (3 + 1) * 32)
    assert said["state"] == f"0 bytes per token and {fixed:,} fixed per sequence, F32"
    assert said["quantization"] == "none"
    assert said["heads"] == "causal-lm, tied to the embedding"


def test_attention_grows_and_windows_do_not(tmp_path: Path) -> None:
    facts = describe(saved(tmp_path, CONFIGS["gemma2"]))
    assert facts["layers"] == "2 attention to 7 tokens, 1 full attention"
    per_token = 2 * 2 * 16 * 4  # keys and values of two heads of 16 in one layer
    fixed = 2 * 7 * per_token
    assert facts["state"].startswith(f"{per_token:,} bytes per token and {fixed:,} fixed")


def test_heads_and_quantization_are_named(tmp_path: Path) -> None:
    config = CONFIGS["gemma"]
    labels = {"score.weight": mx.ones((5, 32)), "score.bias": mx.ones((5,))}
    assert describe(saved(tmp_path, config, **labels))["heads"] == "token-classification, 5 labels"
    model = random_model(config)
    nn.quantize(model, group_size=32, bits=4)
    described = config | {"quantization": {"group_size": 32, "bits": 4}}
    facts = describe(write_checkpoint(tmp_path / "q", described, flat(model)))
    assert facts["quantization"] == "15 affine 4-bit in groups of 32"
    assert facts["parameters"] == describe(saved(tmp_path, config))["parameters"]


def test_a_bidirectional_model_has_no_state(tmp_path: Path) -> None:
    facts = describe(saved(tmp_path, CONFIGS["gemma"] | {"use_bidirectional_attention": True}))
    assert facts["state"] == "none: reads whole texts"


def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 1
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("mlxmodels: ")
    assert "has no config.json" in streams.err and len(streams.err.splitlines()) == 1
