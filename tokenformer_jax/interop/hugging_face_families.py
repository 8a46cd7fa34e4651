"""The `model_type`s of Hugging Face that are read and written, and what they call the fields of our configuration."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What one `model_type` calls the fields of our configuration.

  Attributes:
    preset: our name of the architecture.
    architectures: the classes in transformers and our tasks; a config.json without a class has the first one's.
    sizes: our field -> theirs, which a config.json must have.
    options: our field, with its part, -> (theirs, the value where a config.json leaves it out).
    fixed: their field -> (the only value that is supported, which is also the value where it is left out).
  """

  preset: str
  architectures: dict[str, str]
  sizes: dict[str, str]
  options: dict[str, tuple[str, Any]]
  fixed: dict[str, Any]


_SIZES = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "hidden_size": "hidden_size",
  "num_heads": "num_attention_heads",
  "ffn_tokens": "intermediate_size",
}
_COMMON = {"quantization_config": None}

FAMILIES = {
  "gpt_neox": Family(
    preset="gpt-neox",
    architectures={"GPTNeoXForCausalLM": "next_token"},
    sizes=_SIZES,
    options={
      "seq_length": ("max_position_embeddings", 2048),
      "norm_epsilon": ("layer_norm_eps", 1e-5),
      "ffn.activation": ("hidden_act", "gelu"),
      "tied": ("tie_word_embeddings", False),
      "attention.bias": ("attention_bias", True),
      "residual.parallel": ("use_parallel_residual", True),
      "rotary_fraction": ("rotary_pct", 0.25),
      "rotary_base": ("rotary_emb_base", 10_000.0),
    },
    fixed=_COMMON,
  ),
  "gpt2": Family(
    preset="gpt2",
    architectures={"GPT2LMHeadModel": "next_token"},
    sizes={"vocab_size": "vocab_size", "num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head"},
    options={
      "ffn_tokens": ("n_inner", None),
      "seq_length": ("n_positions", 1024),
      "norm_epsilon": ("layer_norm_epsilon", 1e-5),
      "ffn.activation": ("activation_function", "gelu_new"),
      "tied": ("tie_word_embeddings", True),
    },
    fixed={
      **_COMMON,
      "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False,
      "add_cross_attention": False,
    },
  ),
  "llama": Family(
    preset="transformer",
    architectures={"LlamaForCausalLM": "next_token"},
    sizes=_SIZES,
    options={
      "attention.num_kv_heads": ("num_key_value_heads", None),
      "seq_length": ("max_position_embeddings", 2048),
      "norm_epsilon": ("rms_norm_eps", 1e-6),
      "ffn.activation": ("hidden_act", "silu"),
      "tied": ("tie_word_embeddings", False),
      "attention.bias": ("attention_bias", False),
      "ffn.bias": ("mlp_bias", False),
      "rotary_base": ("rope_theta", 10_000.0),
    },
    fixed=_COMMON,
  ),
  "mixtral": Family(
    preset="mixtral",
    architectures={"MixtralForCausalLM": "next_token"},
    sizes=_SIZES,
    options={
      "attention.num_kv_heads": ("num_key_value_heads", 8),
      "seq_length": ("max_position_embeddings", 131_072),
      "norm_epsilon": ("rms_norm_eps", 1e-5),
      "ffn.activation": ("hidden_act", "silu"),
      "ffn.experts": ("num_local_experts", 8),
      "ffn.chosen": ("num_experts_per_tok", 2),
      "tied": ("tie_word_embeddings", False),
      "rotary_base": ("rope_theta", 1_000_000.0),
    },
    fixed={**_COMMON, "sliding_window": None},
  ),
  "bert": Family(
    preset="bert-original",
    architectures={
      "BertForMaskedLM": "masked_token",
      "BertForPreTraining": "masked_token",
      "BertForSequenceClassification": "classify",
      "BertModel": "encode",
    },
    sizes=_SIZES,
    options={
      "seq_length": ("max_position_embeddings", 512),
      "norm_epsilon": ("layer_norm_eps", 1e-12),
      "ffn.activation": ("hidden_act", "gelu"),
      "token_types": ("type_vocab_size", 2),
    },
    fixed={
      **_COMMON,
      "position_embedding_type": "absolute",
      "is_decoder": False,
      "add_cross_attention": False,
      "tie_word_embeddings": True,
    },
  ),
  "vit": Family(
    preset="vit",
    architectures={"ViTForImageClassification": "classify", "ViTModel": "encode"},
    sizes={ours: theirs for ours, theirs in _SIZES.items() if ours != "vocab_size"},
    options={
      "norm_epsilon": ("layer_norm_eps", 1e-12),
      "ffn.activation": ("hidden_act", "gelu"),
      "vision.image_size": ("image_size", 224),
      "vision.patch_size": ("patch_size", 16),
      "vision.channels": ("num_channels", 3),
    },
    fixed={**_COMMON, "qkv_bias": True, "pooler_act": "tanh"},
  ),
}
