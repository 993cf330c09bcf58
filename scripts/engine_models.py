"""Models that the engine's benchmarks run on: random ones of about 100 million parameters, and
copies of a model that mlx-lm reads.

Run as a program it writes one, in a process that gives its memory back:

    .venv/bin/python scripts/engine_models.py random gemma2 DIRECTORY
    .venv/bin/python scripts/engine_models.py float32 MODEL DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FAMILIES = ("gemma", "gemma2", "recurrent_gemma", "nemotron", "open_llama", "xglm")

# Of bench_models.SIZES, "large" with a vocabulary that makes it 100 million.
VOCABULARY = 32000
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 4000,
}

# mlx-lm's port of what it calls differently; XGLM it has not, so there it drives our port.
COUNTERPARTS = {"open-llama": "llama"}
WITHOUT_COUNTERPART = ("xglm",)


def write_random(name: str, directory: Path) -> None:
    """A model of a family, or "tiny", in float32, with a tokenizer that has all its tokens."""
    import bench_models
    import mlx.core as mx
    from mlx.utils import tree_flatten

    size = TINY if name == "tiny" else bench_models.SIZES["large"] | {"vocab_size": VOCABULARY}
    family = bench_models.FAMILIES["open_llama" if name == "tiny" else name]
    config = bench_models.config_of(family, size)
    model = bench_models.our_model(config, mx.float32)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(directory, config["vocab_size"])


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """One token per byte, then words nobody says, none of which ends a sequence."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"word{i}" for i in range(len(words), vocabulary)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def link_for_mlx_lm(source: Path, directory: Path, **changes: Any) -> Path:
    """A directory with the files of `source` and a config.json that mlx-lm understands."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (directory / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    if config["model_type"] in COUNTERPARTS:
        config |= {"model_type": COUNTERPARTS[config["model_type"]], "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_float32(source: Path, directory: Path) -> None:
    """A copy of a model with float32 weights whose answers never end by themselves.

    Its end of sequence becomes a token that no text contains, so that every answer has the length
    asked for, in our server and in mlx-lm's.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    linked = link_for_mlx_lm(source, directory.parent / "linked")
    model, _ = load_model(linked)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    directory.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    unused = [token for token in vocabulary["added_tokens"] if token["special"]][-1]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        content.pop("quantization", None)
        key, value = ("eos_token", unused["content"]), ("eos_token_id", unused["id"])
        content |= dict([key if name == "tokenizer_config.json" else value])
        (directory / name).write_text(json.dumps(content))
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


if __name__ == "__main__":
    kind, what, target = sys.argv[1:]
    if kind == "random":
        write_random(what, Path(target))
    else:
        write_float32(Path(what), Path(target))
