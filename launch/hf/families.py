"""The model families of transformers that our decoder computes, as plain data.

A family says which field of its configuration holds each field of `GPTConfig`, which fields of
`GPTConfig` have only one value in it, and which of its tensors make up each of ours. `config.py`
and `tensors.py` read these tables in both directions.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A layer of ours (`{i}`: the block) and those of the family that it is made of, in order.

    With several, ours is fused: their output features, one after the other. With `transposed`, the
    family keeps its one matrix as `[in, out]` (GPT-2's Conv1D), and ours is `[out, in]`. With
    `by_head`, its rows are each head's query, key and value in turn (GPT-NeoX).
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        model_type: as in config.json.
        architecture: the class with a language model's head.
        fields: a field of `GPTConfig` -> the configuration's fields that hold its value. A dot
            leads into a block of the configuration.
        fixed: fields of `GPTConfig` that have this value in every model of the family.
        layers: how the tensors correspond.
        settings: fields of the configuration with which the family computes what ours does.
        at_least_context: fields that change nothing if they are None or at least the context.
        constants: tensors (regular expressions) that old files hold and the model's code computes.
        base_prefix: begins the names of all tensors but the head's; some files leave it out.
        head: the projection onto the vocabulary, as files name it.
    """

    model_type: str
    architecture: str
    fields: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]
    layers: tuple[Layer, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    at_least_context: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    base_prefix: str = "model."
    head: str = "lm_head.weight"


_GPT2_LAYERS = (
    Layer("embedding.token", ("transformer.wte",)),
    Layer("embedding.position", ("transformer.wpe",)),
    Layer("blocks.{i}.attention_norm", ("transformer.h.{i}.ln_1",)),
    Layer("blocks.{i}.attention.qkv", ("transformer.h.{i}.attn.c_attn",), transposed=True),
    Layer("blocks.{i}.attention.out", ("transformer.h.{i}.attn.c_proj",), transposed=True),
    Layer("blocks.{i}.mlp_norm", ("transformer.h.{i}.ln_2",)),
    Layer("blocks.{i}.mlp.up", ("transformer.h.{i}.mlp.c_fc",), transposed=True),
    Layer("blocks.{i}.mlp.down", ("transformer.h.{i}.mlp.c_proj",), transposed=True),
    Layer("norm", ("transformer.ln_f",)),
    Layer("output", ("lm_head",)),
)
_BLOCK = "model.layers.{i}"
_LLAMA_LAYERS = (
    Layer("embedding.token", ("model.embed_tokens",)),
    Layer("blocks.{i}.attention_norm", (f"{_BLOCK}.input_layernorm",)),
    Layer("blocks.{i}.attention.qkv", tuple(f"{_BLOCK}.self_attn.{p}_proj" for p in "qkv")),
    Layer("blocks.{i}.attention.out", (f"{_BLOCK}.self_attn.o_proj",)),
    Layer("blocks.{i}.attention.query_norm", (f"{_BLOCK}.self_attn.q_norm",)),
    Layer("blocks.{i}.attention.key_norm", (f"{_BLOCK}.self_attn.k_norm",)),
    Layer("blocks.{i}.mlp_norm", (f"{_BLOCK}.post_attention_layernorm",)),
    Layer("blocks.{i}.mlp.up", (f"{_BLOCK}.mlp.gate_proj", f"{_BLOCK}.mlp.up_proj")),
    Layer("blocks.{i}.mlp.down", (f"{_BLOCK}.mlp.down_proj",)),
    Layer("norm", ("model.norm",)),
    Layer("output", ("lm_head",)),
)
_ROTARY_TABLES = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

_NEOX_BLOCK = "gpt_neox.layers.{i}"
_NEOX_LAYERS = (
    Layer("embedding.token", ("gpt_neox.embed_in",)),
    Layer("blocks.{i}.attention_norm", (f"{_NEOX_BLOCK}.input_layernorm",)),
    Layer("blocks.{i}.attention.qkv", (f"{_NEOX_BLOCK}.attention.query_key_value",), by_head=True),
    Layer("blocks.{i}.attention.out", (f"{_NEOX_BLOCK}.attention.dense",)),
    Layer("blocks.{i}.mlp_norm", (f"{_NEOX_BLOCK}.post_attention_layernorm",)),
    Layer("blocks.{i}.mlp.up", (f"{_NEOX_BLOCK}.mlp.dense_h_to_4h",)),
    Layer("blocks.{i}.mlp.down", (f"{_NEOX_BLOCK}.mlp.dense_4h_to_h",)),
    Layer("norm", ("gpt_neox.final_layer_norm",)),
    Layer("output", ("embed_out",)),
)

_GPT2_FIELDS: dict[str, tuple[str, ...]] = {
    "layers": ("n_layer",),
    "hidden": ("n_embd",),
    "heads": ("n_head",),
    "vocab": ("vocab_size",),
    "context": ("n_positions",),
    "ffn": ("n_inner",),
    "norm_eps": ("layer_norm_epsilon",),
    "tied": ("tie_word_embeddings",),
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "init_std": ("initializer_range",),
}
_LLAMA_FIELDS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings",),
    "ffn": ("intermediate_size",),
    "rope_theta": ("rope_parameters.rope_theta",),
    "norm_eps": ("rms_norm_eps",),
    "tied": ("tie_word_embeddings",),
    "init_std": ("initializer_range",),
}
_NEOX_FIELDS: dict[str, tuple[str, ...]] = {
    name: keys for name, keys in _LLAMA_FIELDS.items() if name not in ("kv_heads", "head_dim")
} | {"norm_eps": ("layer_norm_eps",), "dropout": ("hidden_dropout", "attention_dropout")}
_LLAMA_FIXED: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": False,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2_FIELDS,
            {
                "position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True,
                "qk_norm": False,
            },
            _GPT2_LAYERS,
            constants=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
            base_prefix="transformer.",
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            {**_LLAMA_FIELDS, "bias": ("attention_bias", "mlp_bias")},
            _LLAMA_FIXED,
            _LLAMA_LAYERS,
            constants=_ROTARY_TABLES,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _LLAMA_FIELDS,
            {**_LLAMA_FIXED, "bias": False, "qk_norm": True},
            _LLAMA_LAYERS,
            constants=_ROTARY_TABLES,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _LLAMA_FIELDS,
            {**_LLAMA_FIXED, "bias": False},
            _LLAMA_LAYERS,
            at_least_context=("sliding_window",),
            constants=_ROTARY_TABLES,
        ),
        # GPT-2 with rotary positions.
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            _NEOX_FIELDS,
            {
                "position": "rope", "norm": "layernorm", "mlp": "gelu", "bias": True,
                "qk_norm": False,
            },
            _NEOX_LAYERS,
            settings=(
                ("hidden_act", "gelu_new"),
                ("use_parallel_residual", False),
                ("rope_parameters.partial_rotary_factor", 1.0),
            ),
            base_prefix="gpt_neox.",
            head="embed_out.weight",
        ),
    )
}  # fmt: skip

# Fields of any configuration that do not change a model's logits. Every other field has to be one
# that we compute, or have the value that the exported model would have.
WITHOUT_EFFECT = {
    # What produced the file, and what it is called.
    "transformers_version", "_name_or_path", "architectures", "dtype", "task_specific_params",
    # What a call returns, and the cache of generation.
    "output_hidden_states", "output_attentions", "return_dict", "use_cache",
    # Ids of special tokens: the tokenizer's and the generation's.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
    # Heads of other tasks.
    "id2label", "label2id", "problem_type", "_num_labels", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # Repeats n_positions; splits matrix products, which transformers no longer does; begins the
    # layers with a sliding window, where use_sliding_window asks for one.
    "n_ctx", "pretraining_tp", "max_window_layers",
}  # fmt: skip
