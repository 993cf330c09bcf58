"""The tiny models that scripts/make_golden.py makes: one line or more per documented fact.

A config names only what differs from its family's base, so the keys of `config` (and of `saved`)
are the fields that a variant is about.
"""

from dataclasses import dataclass, field
from typing import Any

FAMILIES = {
    "recurrent_gemma": "RecurrentGemma",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "nemotron": "Nemotron",
    "xglm": "XGLM",
    "open_llama": "OpenLlama",
}

HEADS = {
    "base": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}

TRANSFORMER: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

BASE: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        **TRANSFORMER,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_key_value_heads": 1, "attention_window_size": 7},
    },
    "gemma": {**TRANSFORMER, "num_key_value_heads": 2, "head_dim": 12},
    "gemma2": {
        **TRANSFORMER,
        **{"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 12},
        **{"query_pre_attn_scalar": 16, "sliding_window": 7},
    },
    "nemotron": {**TRANSFORMER, "num_key_value_heads": 2, "head_dim": 12},
    "xglm": {
        **{"vocab_size": 97, "d_model": 24, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4},
        "max_position_embeddings": 64,
    },
    "open_llama": {
        **TRANSFORMER,
        **{"max_position_embeddings": 64, "use_memory_efficient_attention": False},
    },
}

# Fields of the config classes that change nothing when a model is only run.
NO_EFFECT = {
    *("model_type", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"),
    *("attention_dropout", "initializer_range", "w_init_variance_scale"),
    *("dropout", "activation_dropout", "layerdrop", "init_std", "decoder_start_token_id"),
    *("hidden_dropout_prob", "attention_dropout_prob"),
}
# Without an encoder's states cross-attention is never reached; no released checkpoint has it.
NOT_COVERED = {"add_cross_attention"}

WHOLE = ("whole",)
DECODER = ("whole", "decode")
PADDED = ("left_padded", "right_padded")
HIDDEN = ("whole", "hidden", *PADDED)
EVERYTHING = (
    *DECODER,
    *("hidden", "attentions", "loss", "embeds", "positions", "packed"),
    *(*PADDED, "both_padded"),
)

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Variant:
    """One tiny model and the cases computed with it (`CASES` of golden_reference.py)."""

    config: dict[str, Any] = field(default_factory=dict)
    """Given to the reference, over the family's base."""

    saved: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that differ from what the reference was given; ABSENT leaves one out."""

    cases: tuple[str, ...] = DECODER

    task: str = "causal-lm"

    tokens: int = 36
    """Length of `whole` and `decode`."""

    prefill: int = 9
    """Tokens that `decode` reads at once before it goes on one by one."""

    classic: bool = False
    """Whether config.json is in the style of transformers 4."""

    dtype: str = "float32"

    reference: str | None = None
    """Another family's class computes it; the config is saved as this family's."""


ABSENT = object()


def rope(theta: float = 10000.0, kind: str = "default", **more: float) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 has them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def of_every_family() -> dict[str, Variant]:
    variants = {}
    for family in FAMILIES:
        variants[f"{family}_default"] = Variant(cases=EVERYTHING, tokens=70)
        variants[f"{family}_base"] = Variant(task="base", tokens=24, cases=HIDDEN)
        for dtype in ("bfloat16", "float16"):
            variants[f"{family}_{dtype}"] = Variant(cases=WHOLE, tokens=64, dtype=dtype)
    return variants


def of_sequence_classification() -> dict[str, Variant]:
    def variant(*cases: str, **config: Any) -> Variant:
        small = SMALL | {"pad_token_id": 5} | config
        return Variant(task="sequence-classification", tokens=20, cases=cases, config=small)

    variants = {}
    for family in ("gemma", "gemma2", "nemotron", "open_llama"):
        name = f"{family}_sequence"
        variants[f"{name}_classification"] = variant(
            *("whole", *PADDED, "embeds", "single_label", "multi_label"), num_labels=3
        )
        names = ("north", "east", "south", "west", "nowhere")
        variants[f"{name}_id2label"] = variant(
            *("whole", "single_label"), id2label=dict(enumerate(names))
        )
        variants[f"{name}_regression"] = variant("whole", "regression", num_labels=1)
        # Float labels in three columns would be taken for several labels each.
        variants[f"{name}_problem_type"] = variant(
            *("whole", "regression"), num_labels=3, problem_type="regression"
        )
    # Nemotron's default: one row at a time, pooled at its last token.
    variants["nemotron_sequence_no_pad"] = variant("whole", pad_token_id=None)
    return variants


def of_every_token() -> dict[str, Variant]:
    cases = ("whole", *PADDED, "loss")
    task = "token-classification"
    variants = {
        f"{family}_token_classification": Variant(
            task=task, cases=cases, tokens=20, config=SMALL | {"num_labels": labels}
        )
        # Two labels are the default, which config.json does not mention.
        for family, labels in (("gemma", 4), ("gemma2", 2), ("nemotron", 3))
    }
    task = "question-answering"
    variants["nemotron_question_answering"] = Variant(
        task=task, cases=cases, tokens=20, config=SMALL
    )
    return variants


RECURRENT_GEMMA = {
    "recurrent_gemma_default": Variant(
        cases=EVERYTHING, tokens=70, config={"num_hidden_layers": 6}
    ),
    "recurrent_gemma_lru_width": Variant(
        prefill=3,
        classic=True,
        config={
            "lru_width": 40,
            "num_key_value_heads": 2,
            "conv1d_width": 2,
            "num_hidden_layers": 4,
            "block_types": ["recurrent", "attention"],
            **rope(500.0, partial_rotary_factor=0.25),
        },
        saved={"embeddings_scale_by_sqrt_dim": True},
    ),
    "recurrent_gemma_attention_first": Variant(
        config={
            "num_key_value_heads": None,
            "num_hidden_layers": 5,
            "block_types": ["attention", "recurrent", "recurrent"],
            "attention_bias": True,
            "conv1d_width": 5,
            "hidden_activation": "gelu",
            "logits_soft_cap": 1.5,
            **rope(partial_rotary_factor=1.0),
        },
        saved={"num_key_value_heads": None, "lru_width": None},
    ),
    "recurrent_gemma_all_recurrent": Variant(
        cases=WHOLE,
        classic=True,
        config={"block_types": ["recurrent"], "conv1d_width": 3},
    ),
    "recurrent_gemma_all_attention": Variant(
        prefill=12, config={"block_types": ["attention"], "num_hidden_layers": 2}
    ),
    "recurrent_gemma_wide_window": Variant(
        cases=WHOLE, config={"attention_window_size": 64, "rms_norm_eps": 1e-3}
    ),
    # DeepMind's window of W is transformers' of W + 1.
    "recurrent_gemma_window_plus_self": Variant(
        cases=WHOLE,
        config={"attention_window_size": 8},
        saved={"attention_window_size": 7, "attention_window_includes_self": False},
    ),
    "recurrent_gemma_untied": Variant(
        config={"tie_word_embeddings": False, "conv1d_width": 1, "pad_token_id": 3}
    ),
}

GEMMA = {
    # As the released files are: one key head, and a "gelu" that means its tanh approximation.
    "gemma_classic": Variant(
        classic=True,
        config={"num_key_value_heads": 1, "head_dim": 8, **rope(500.0)},
        saved={"hidden_act": "gelu", "hidden_activation": None},
    ),
    "gemma_silu": Variant(
        config={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-3,
            "attention_bias": True,
            "num_key_value_heads": 4,
            "max_position_embeddings": 16,
        }
    ),
    "gemma_untied": Variant(config={"tie_word_embeddings": False, **rope(500.0)}),
    "gemma_linear": Variant(config=rope(kind="linear", factor=2.5)),
    "gemma_bidirectional": Variant(
        cases=HIDDEN, tokens=24, config=SMALL | {"use_bidirectional_attention": True}
    ),
}

GEMMA2 = {
    "gemma2_classic": Variant(
        classic=True,
        config={"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, **rope(500.0)},
        saved={
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window_size": 7,
        },
    ),
    # Nothing that has a default is mentioned.
    "gemma2_sparse": Variant(
        classic=True,
        config={"query_pre_attn_scalar": 256},
        saved=dict.fromkeys(
            (
                *("query_pre_attn_scalar", "attention_bias", "hidden_activation"),
                *("attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps"),
                *("rope_theta", "tie_word_embeddings", "use_bidirectional_attention"),
            ),
            ABSENT,
        ),
    ),
    "gemma2_window": Variant(
        config={
            "sliding_window": 3,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "max_position_embeddings": 16,
        }
    ),
    "gemma2_softcaps": Variant(
        config={
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "hidden_activation": "gelu",
            "rms_norm_eps": 1e-3,
        }
    ),
    "gemma2_no_softcaps": Variant(
        config={
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
    ),
    "gemma2_linear": Variant(classic=True, config=rope(500.0, "linear", factor=2.5)),
    # transformers' masks keep W keys to either side where its flash attention, the only one that
    # knows this option of Gemma 2, keeps W - 1; and as many key heads as rows.
    "gemma2_bidirectional": Variant(
        cases=HIDDEN,
        tokens=24,
        config={
            **SMALL,
            "use_bidirectional_attention": True,
            "sliding_window": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
        saved={"sliding_window": 7},
    ),
}

NEMOTRON = {
    "nemotron_classic": Variant(
        classic=True,
        config={"head_dim": 16, **rope(500.0, partial_rotary_factor=0.25)},
        saved={
            **{"kv_channels": 16, "head_dim": ABSENT},
            **{"rope_percent": 0.25, "partial_rotary_factor": ABSENT},
        },
    ),
    "nemotron_silu": Variant(
        config={
            "hidden_act": "silu",
            "norm_eps": 1e-3,
            "attention_bias": True,
            "mlp_bias": True,
            "max_position_embeddings": 16,
        }
    ),
    "nemotron_tied": Variant(
        config={"tie_word_embeddings": True, **rope(500.0, partial_rotary_factor=1.0)}
    ),
    # transformers 5 does not accept the null that its documentation allows.
    "nemotron_null": Variant(
        config={"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None},
        saved={"num_key_value_heads": None, "head_dim": None},
    ),
    "nemotron_linear": Variant(config=rope(kind="linear", factor=2.5, partial_rotary_factor=0.5)),
}

XGLM = {
    "xglm_unscaled": Variant(
        config={
            "scale_embedding": False,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "ffn_dim": 40,
        }
    ),
    # An odd width leaves the last channel without a position.
    "xglm_odd_width": Variant(classic=True, config={"d_model": 27, "attention_heads": 3}),
    "xglm_short_table": Variant(
        cases=(*DECODER, "left_padded"), config={"max_position_embeddings": 8}
    ),
    # The table of positions has a row of zeros at the padding id: token 3 gets no position.
    "xglm_pad_token": Variant(
        config={"pad_token_id": 5},
        saved={
            **{"d_model": ABSENT, "num_layers": ABSENT, "attention_heads": ABSENT},
            **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        },
    ),
}

OPEN_LLAMA = {
    "open_llama_plain": Variant(
        config={
            "use_stable_embedding": False,
            "shared_input_output_embedding": False,
            "rope_theta": 500.0,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
        }
    ),
    # Either option makes the embedding the head.
    "open_llama_tied": Variant(
        config={"shared_input_output_embedding": False, "tie_word_embeddings": True},
        saved={"use_memorry_efficient_attention": True, "use_memory_efficient_attention": ABSENT},
    ),
    "open_llama_linear": Variant(config={"rope_scaling": {"type": "linear", "factor": 2.5}}),
    # A cached key keeps the base of its time, so only whole calls are a reference.
    "open_llama_dynamic": Variant(
        cases=("whole", *PADDED),
        config={"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ),
    "open_llama_dynamic_one_layer": Variant(
        cases=("whole", "prefixes"),
        config={
            "num_hidden_layers": 1,
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
    ),
    # Open-Llama without its own additions is Llama, the reference for grouped queries.
    "open_llama_grouped": Variant(
        reference="Llama",
        config={"num_key_value_heads": 2, "tie_word_embeddings": True},
        saved={
            "model_type": "open-llama",
            "use_stable_embedding": False,
            "shared_input_output_embedding": True,
        },
    ),
}

VARIANTS = {
    **of_every_family(),
    **of_sequence_classification(),
    **of_every_token(),
    **RECURRENT_GEMMA,
    **GEMMA,
    **GEMMA2,
    **NEMOTRON,
    **XGLM,
    **OPEN_LLAMA,
}
