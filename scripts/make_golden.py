#!/usr/bin/env python3
"""Writes tests/golden/: tiny random models and what the reference implementations make of them.

Run it with any Python 3.11; it builds an environment of its own per family (torch and the pinned
transformers, about 1 GB each) outside the repository, and does the work inside:

    scripts/make_golden.py                              # all families
    scripts/make_golden.py --model open_llama           # one family
    scripts/make_golden.py --python recurrent_gemma=/path/to/venv/bin/python

Each variant becomes NAME.json, the config as a checkpoint would hold it, and NAME.safetensors: the
weights under `weights.`, `tokens`, `logits` of one forward call, and, where the variant says so,
`decode_logits` (a cached prefill of `prefill` tokens, then token by token) and `prefix_logits` (the
last logits of one forward call per prefix, a pristine model for each).
"""

import argparse
import copy
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "tests" / "golden"
ENVIRONMENTS = Path.home() / ".cache" / "gryphon" / "golden"

PINS = {
    "recurrent_gemma": ["torch==2.13.0", "transformers==5.23.0", "numpy", "safetensors"],
    "open_llama": ["torch==2.13.0", "transformers==4.40.2", "numpy<2", "safetensors"],
}

RECURRENT_GEMMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "attention_window_size": 7,
    "logits_soft_cap": 30.0,
}

OPEN_LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_memory_efficient_attention": False,
}

# "T" tokens; "prefill" of them at once before decoding; "classic" rewrites the saved config in the
# style of transformers 4; "config" is given to the reference, "saved" replaces keys on disk.
VARIANTS: dict[str, dict[str, Any]] = {
    "recurrent_gemma_default": {"T": 40, "prefill": 10, "config": {}},
    "recurrent_gemma_lru_width": {
        "T": 40,
        "prefill": 3,
        "classic": True,
        "config": {
            "lru_width": 48,
            "num_key_value_heads": 2,
            "conv1d_width": 2,
            "num_hidden_layers": 4,
            "block_types": ["recurrent", "attention"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "recurrent_gemma_attention_first": {
        "T": 40,
        "prefill": 10,
        "config": {
            "num_key_value_heads": None,
            "num_hidden_layers": 5,
            "block_types": ["attention", "recurrent", "recurrent"],
            "attention_bias": True,
            "conv1d_width": 5,
            "hidden_activation": "gelu",
            "logits_soft_cap": 1.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    },
    "recurrent_gemma_all_recurrent": {
        "T": 33,
        "classic": True,
        "config": {"block_types": ["recurrent"], "num_hidden_layers": 2, "conv1d_width": 3},
    },
    "recurrent_gemma_all_attention": {
        "T": 40,
        "prefill": 12,
        "config": {"block_types": ["attention"], "num_hidden_layers": 2},
    },
    "recurrent_gemma_wide_window": {
        "T": 33,
        "config": {"attention_window_size": 64, "num_hidden_layers": 3, "rms_norm_eps": 1e-3},
    },
    # DeepMind's window of W is transformers' of W + 1.
    "recurrent_gemma_window_plus_self": {
        "T": 40,
        "config": {"attention_window_size": 8, "num_hidden_layers": 3},
        "saved": {"attention_window_size": 7, "attention_window_includes_self": False},
    },
    "open_llama_default": {"T": 40, "prefill": 9, "config": {}},
    "open_llama_plain": {
        "T": 40,
        "prefill": 9,
        "config": {
            "use_stable_embedding": False,
            "shared_input_output_embedding": False,
            "rope_theta": 500.0,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
        },
    },
    "open_llama_linear": {
        "T": 40,
        "prefill": 9,
        "config": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    },
    "open_llama_dynamic": {
        "T": 40,
        "config": {
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
        },
    },
    "open_llama_dynamic_one_layer": {
        "T": 40,
        "prefixes": True,
        "config": {
            "num_hidden_layers": 1,
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
    },
    # Open-Llama without its own additions is Llama, the reference for grouped queries.
    "open_llama_grouped": {
        "T": 40,
        "prefill": 9,
        "reference": "llama",
        "config": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "saved": {
            "model_type": "open-llama",
            "use_stable_embedding": False,
            "shared_input_output_embedding": True,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=PINS, action="append", help="family; default all")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="FAMILY=PATH",
        help="use this environment instead of making one",
    )
    parser.add_argument("--worker", choices=PINS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        write_family(arguments.worker)
        return
    given = dict(item.split("=", 1) for item in arguments.python)
    for family in arguments.model or PINS:
        python = given.get(family) or str(environment(family))
        subprocess.run([python, __file__, "--worker", family], check=True)


def environment(family: str) -> Path:
    """Python of a virtual environment that holds the family's reference; made at first use."""
    path = ENVIRONMENTS / family
    python = path / "bin" / "python"
    done = path / "pins.txt"
    pins = "\n".join(PINS[family])
    if not done.is_file() or done.read_text() != pins:
        venv.create(path, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PINS[family]], check=True)
        done.write_text(pins)
    return python


def write_family(family: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    print(f"{family}: torch {torch.__version__}, transformers {transformers.__version__}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        if name.startswith(family):
            write_variant(name, variant, family, seed)


def write_variant(name: str, variant: dict[str, Any], family: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    model = build(variant.get("reference", family), variant["config"], seed)
    tokens = torch.randint(0, 97, (1, variant["T"]), generator=torch.Generator().manual_seed(seed))
    tensors = {f"weights.{key}": value for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings or getattr(
        model.config, "shared_input_output_embedding", False
    ):
        tensors.pop("weights.lm_head.weight", None)
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    with torch.no_grad():
        tensors["tokens"] = tokens.to(torch.int32)
        # A pristine copy per call: both families keep state on their modules.
        tensors["logits"] = copy.deepcopy(model)(tokens, use_cache=False).logits
        if "prefill" in variant:
            tensors["decode_logits"] = decode(copy.deepcopy(model), tokens, variant["prefill"])
        if variant.get("prefixes"):
            last = [
                copy.deepcopy(model)(tokens[:, :n], use_cache=False).logits[:, -1]
                for n in range(1, variant["T"] + 1)
            ]
            tensors["prefix_logits"] = torch.stack(last, dim=1)
    save_file(tensors, OUTPUT / f"{name}.safetensors")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = keep(config, variant["config"], family) | variant.get("saved", {})
    if variant.get("classic"):
        config = classic(config)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (OUTPUT / f"{name}.json").write_text(text)
    std = tensors["logits"].std()
    print(f"  {name}: logits std {std:.2f}, {sum(t.nbytes for t in tensors.values()):,} bytes")


def build(reference: str, changes: dict[str, Any], seed: int) -> Any:
    """The reference model with weights that make every part of it matter."""
    import torch
    import transformers

    if reference == "recurrent_gemma":
        config = transformers.RecurrentGemmaConfig(**RECURRENT_GEMMA | changes)
        model = transformers.RecurrentGemmaForCausalLM(config)
    elif reference == "open_llama":
        config = transformers.OpenLlamaConfig(**OPEN_LLAMA | changes)
        model = transformers.OpenLlamaForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**OPEN_LLAMA | changes)
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1000 + seed)

    def random(shape: Any, scale: float) -> Any:
        return torch.randn(shape, generator=generator) * scale

    for key, value in sorted(model.named_parameters()):
        if key.endswith("recurrent_param"):
            new = torch.rand(value.shape, generator=generator) * 5.0 - 4.5  # decays 0.01 to 0.99
        elif value.ndim == 1 or key.endswith("gate_bias"):
            new = random(value.shape, 0.3)
            if "norm.weight" in key or "layernorm.weight" in key:
                new = new + (0.0 if reference == "recurrent_gemma" else 1.0)
        elif "embed_tokens" in key:
            new = random(value.shape, 0.3)
        else:
            fan_in = value.shape[-2] if key.endswith("gate_weight") else value[0].numel()
            new = random(value.shape, 1.3 * fan_in**-0.5)
        value.data.copy_(new)
    return model.eval()


def decode(model: Any, tokens: Any, prefill: int) -> Any:
    """Logits of a cached prefill followed by one token at a time."""
    import torch
    import transformers

    # RecurrentGemma takes a cache and writes into it; the older models return a new one.
    takes = model.config.model_type == "recurrent_gemma"
    cache = transformers.DynamicCache(config=model.config) if takes else None
    pieces = []
    edges = [0, *range(prefill, tokens.shape[1] + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        out = model(
            tokens[:, begin:end],
            position_ids=torch.arange(begin, end)[None],
            use_cache=True,
            past_key_values=cache,
        )
        cache = cache if takes else out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


def keep(config: dict[str, Any], changes: dict[str, Any], family: str) -> dict[str, Any]:
    """The keys that describe the architecture, as the reference saved them."""
    base = RECURRENT_GEMMA if family == "recurrent_gemma" else OPEN_LLAMA
    also = {
        *("model_type", "architectures", "rms_norm_eps", "hidden_activation", "hidden_act"),
        *("rope_parameters", "rope_theta", "rope_scaling", "block_types", "conv1d_width"),
        *("lru_width", "use_stable_embedding", "shared_input_output_embedding"),
        *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    }
    return {key: config[key] for key in config if key in {*base, *changes, *also}}


def classic(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 and the published 2B file spell it."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config["_block_types"] = config.pop("block_types")
    config["torch_dtype"] = "float32"
    return config


if __name__ == "__main__":
    sys.exit(main())
