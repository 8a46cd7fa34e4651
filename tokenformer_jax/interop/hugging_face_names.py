"""The names of Hugging Face's arrays, by `model_type`, and where each of them stands in our tree."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tokenformer_jax.interop.hugging_face_places import Patches, Place, query_key_value, same, transposed

Stored = TypeVar("Stored")

# Their name -> its place in our tree, by `model_type`. The first {} is the layer, the second one the expert. A name whose
# leaf a model lacks (a bias, the head of a tied model) is not in its files.
TABLES: dict[str, dict[str, Place]] = {
  "gpt_neox": {
    "gpt_neox.embed_in.weight": same("embedding"),
    "gpt_neox.layers.{}.input_layernorm.weight": same("blocks/norm/scale"),
    "gpt_neox.layers.{}.input_layernorm.bias": same("blocks/norm/bias"),
    "gpt_neox.layers.{}.post_attention_layernorm.weight": same("blocks/ffn_norm/scale"),
    "gpt_neox.layers.{}.post_attention_layernorm.bias": same("blocks/ffn_norm/bias"),
    "gpt_neox.layers.{}.attention.query_key_value.weight": query_key_value("weight", transposed=True, by_head=True),
    "gpt_neox.layers.{}.attention.query_key_value.bias": query_key_value("bias", by_head=True),
    "gpt_neox.layers.{}.attention.dense.weight": transposed("blocks/attention/proj/weight"),
    "gpt_neox.layers.{}.attention.dense.bias": same("blocks/attention/proj/bias"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": same("blocks/ffn/keys"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": same("blocks/ffn/key_biases"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": transposed("blocks/ffn/values"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": same("blocks/ffn/bias"),
    "gpt_neox.final_layer_norm.weight": same("final_norm/scale"),
    "gpt_neox.final_layer_norm.bias": same("final_norm/bias"),
    "embed_out.weight": same("head"),
  },
  "gpt2": {
    "transformer.wte.weight": same("embedding"),
    "transformer.wpe.weight": same("position_embedding"),
    "transformer.h.{}.ln_1.weight": same("blocks/norm/scale"),
    "transformer.h.{}.ln_1.bias": same("blocks/norm/bias"),
    "transformer.h.{}.attn.c_attn.weight": query_key_value("weight"),
    "transformer.h.{}.attn.c_attn.bias": query_key_value("bias"),
    "transformer.h.{}.attn.c_proj.weight": same("blocks/attention/proj/weight"),
    "transformer.h.{}.attn.c_proj.bias": same("blocks/attention/proj/bias"),
    "transformer.h.{}.ln_2.weight": same("blocks/ffn_norm/scale"),
    "transformer.h.{}.ln_2.bias": same("blocks/ffn_norm/bias"),
    "transformer.h.{}.mlp.c_fc.weight": transposed("blocks/ffn/keys"),
    "transformer.h.{}.mlp.c_fc.bias": same("blocks/ffn/key_biases"),
    "transformer.h.{}.mlp.c_proj.weight": same("blocks/ffn/values"),
    "transformer.h.{}.mlp.c_proj.bias": same("blocks/ffn/bias"),
    "transformer.ln_f.weight": same("final_norm/scale"),
    "transformer.ln_f.bias": same("final_norm/bias"),
    "lm_head.weight": same("head"),
  },
  "llama": {
    "model.embed_tokens.weight": same("embedding"),
    "model.layers.{}.input_layernorm.weight": same("blocks/norm/scale"),
    "model.layers.{}.self_attn.q_proj.weight": transposed("blocks/attention/query/weight"),
    "model.layers.{}.self_attn.q_proj.bias": same("blocks/attention/query/bias"),
    "model.layers.{}.self_attn.k_proj.weight": transposed("blocks/attention/key/weight"),
    "model.layers.{}.self_attn.k_proj.bias": same("blocks/attention/key/bias"),
    "model.layers.{}.self_attn.v_proj.weight": transposed("blocks/attention/value/weight"),
    "model.layers.{}.self_attn.v_proj.bias": same("blocks/attention/value/bias"),
    "model.layers.{}.self_attn.o_proj.weight": transposed("blocks/attention/proj/weight"),
    "model.layers.{}.self_attn.o_proj.bias": same("blocks/attention/proj/bias"),
    "model.layers.{}.post_attention_layernorm.weight": same("blocks/ffn_norm/scale"),
    "model.layers.{}.mlp.gate_proj.weight": same("blocks/ffn/gates"),
    "model.layers.{}.mlp.gate_proj.bias": same("blocks/ffn/gate_biases"),
    "model.layers.{}.mlp.up_proj.weight": same("blocks/ffn/keys"),
    "model.layers.{}.mlp.up_proj.bias": same("blocks/ffn/key_biases"),
    "model.layers.{}.mlp.down_proj.weight": transposed("blocks/ffn/values"),
    "model.layers.{}.mlp.down_proj.bias": same("blocks/ffn/bias"),
    "model.norm.weight": same("final_norm/scale"),
    "lm_head.weight": same("head"),
  },
}
TABLES["mixtral"] = {name: place for name, place in TABLES["llama"].items() if ".mlp." not in name} | {
  "model.layers.{}.block_sparse_moe.gate.weight": same("blocks/ffn/router"),
  "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": same("blocks/ffn/gates"),
  "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": same("blocks/ffn/keys"),
  "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": transposed("blocks/ffn/values"),
}


def _dense(name: str, path: str) -> dict[str, Place]:
  """A `Linear` of theirs that is a `Dense` of ours."""
  return {f"{name}.weight": transposed(f"{path}/weight"), f"{name}.bias": same(f"{path}/bias")}


def _norm(name: str, path: str) -> dict[str, Place]:
  return {f"{name}.weight": same(f"{path}/scale"), f"{name}.bias": same(f"{path}/bias")}


def _feed_forward(inner: str, outer: str) -> dict[str, Place]:
  return {
    f"{inner}.weight": same("blocks/ffn/keys"),
    f"{inner}.bias": same("blocks/ffn/key_biases"),
    f"{outer}.weight": transposed("blocks/ffn/values"),
    f"{outer}.bias": same("blocks/ffn/bias"),
  }


_BERT, _VIT = "bert.encoder.layer.{}", "vit.encoder.layer.{}"
TABLES["bert"] = {
  "bert.embeddings.word_embeddings.weight": same("embedding"),
  "bert.embeddings.position_embeddings.weight": same("position_embedding"),
  "bert.embeddings.token_type_embeddings.weight": same("type_embedding"),
  **_norm("bert.embeddings.LayerNorm", "embedding_norm"),
  **_dense(f"{_BERT}.attention.self.query", "blocks/attention/query"),
  **_dense(f"{_BERT}.attention.self.key", "blocks/attention/key"),
  **_dense(f"{_BERT}.attention.self.value", "blocks/attention/value"),
  **_dense(f"{_BERT}.attention.output.dense", "blocks/attention/proj"),
  **_norm(f"{_BERT}.attention.output.LayerNorm", "blocks/norm"),
  **_feed_forward(f"{_BERT}.intermediate.dense", f"{_BERT}.output.dense"),
  **_norm(f"{_BERT}.output.LayerNorm", "blocks/ffn_norm"),
  **_dense("bert.pooler.dense", "pooler"),
  "cls.predictions.bias": same("transform/logits_bias"),
  **_dense("cls.predictions.transform.dense", "transform/dense"),
  **_norm("cls.predictions.transform.LayerNorm", "transform/norm"),
  **_dense("classifier", "classes"),
}
TABLES["vit"] = {
  "vit.embeddings.cls_token": same("class_token", leading=2),
  "vit.embeddings.position_embeddings": same("position_embedding", leading=1),
  "vit.embeddings.patch_embeddings.projection.weight": Patches(("patches/weight",)),
  "vit.embeddings.patch_embeddings.projection.bias": same("patches/bias"),
  **_norm(f"{_VIT}.layernorm_before", "blocks/norm"),
  **_dense(f"{_VIT}.attention.attention.query", "blocks/attention/query"),
  **_dense(f"{_VIT}.attention.attention.key", "blocks/attention/key"),
  **_dense(f"{_VIT}.attention.attention.value", "blocks/attention/value"),
  **_dense(f"{_VIT}.attention.output.dense", "blocks/attention/proj"),
  **_norm(f"{_VIT}.layernorm_after", "blocks/ffn_norm"),
  **_feed_forward(f"{_VIT}.intermediate.dense", f"{_VIT}.output.dense"),
  **_norm("vit.layernorm", "final_norm"),
  **_dense("vit.pooler.dense", "pooler"),
  **_dense("classifier", "classes"),
}

_PREFIXES = {
  "gpt_neox": "gpt_neox.",
  "gpt2": "transformer.",
  "llama": "model.",
  "mixtral": "model.",
  "bert": "bert.",
  "vit": "vit.",
}
_HEADS = re.compile(r"lm_head\.|embed_out\.|cls\.|classifier\.")
# Buffers that earlier versions of transformers stored; they follow from the configuration.
_BUFFER = re.compile(r"(.*\.)?((attention|attn)\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.position_ids)")
# Names in other files or versions of transformers -> those of the table: GPT-NeoX's head in version 5, norms in BERT's
# first files, ViT's modules in the memory of version 5.
_OTHER_NAMES = {
  "gpt_neox": {r"^lm_head\.": "embed_out."},
  "bert": {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
  "vit": {
    r"^vit\.layers\.": "vit.encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
  },
}
# Arrays of tied models that may be stored a second time -> what they are a copy of.
COPIES = {
  "gpt_neox": {"embed_out.weight": "gpt_neox.embed_in.weight"},
  "gpt2": {"lm_head.weight": "transformer.wte.weight"},
  "llama": {"lm_head.weight": "model.embed_tokens.weight"},
  "mixtral": {"lm_head.weight": "model.embed_tokens.weight"},
  "bert": {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
}
# Heads that BERT was pretrained with, beside that of masked tokens.
_UNUSED_HEADS = re.compile(r"cls\.seq_relationship\.|bert\.pooler\.")


def family_of(names: Iterable[str]) -> str | None:
  """The `model_type` whose embedding is among the names of a state dict, None if there is none."""
  names = set(names)
  for model_type in TABLES:
    embedding = name_at(model_type, "patches/bias" if model_type == "vit" else "embedding")
    if names & {embedding, embedding.removeprefix(_PREFIXES[model_type])}:
      return model_type
  return None


def name_at(model_type: str, path: str) -> str:
  """The name of the array that holds the leaf at `path`, which is of no block."""
  return next(name for name, place in TABLES[model_type].items() if place.paths == (path,))


def full_name(model_type: str, name: str, without_prefix: bool) -> str:
  """The name of the table for a name in a file.

  Args:
    model_type: the family.
    name: as a file has it.
    without_prefix: whether the names of that file lack the family's prefix, which those of heads never have.
  """
  if without_prefix and not _HEADS.match(name):
    name = _PREFIXES[model_type] + name
  for pattern, replacement in _OTHER_NAMES.get(model_type, {}).items():
    name = re.sub(pattern, replacement, name)
  return name


def with_full_names(model_type: str, arrays: Mapping[str, Stored], task: str = "") -> dict[str, Stored]:
  """The arrays of a state dict under the names of the table, without buffers and without heads that the task has no use of.

  The names may lack the prefix that all but the head's have, as those of GPT-2 on the hub do.
  """
  found = {name: array for name, array in arrays.items() if not _BUFFER.fullmatch(name)}
  bare = lacks_prefix(model_type, found)
  full = {full_name(model_type, name, bare): array for name, array in found.items()}
  if (model_type, task) == ("bert", "masked_token"):
    full = {name: array for name, array in full.items() if not _UNUSED_HEADS.match(name)}
  return full


def lacks_prefix(model_type: str, names: Iterable[str]) -> bool:
  """Whether no name begins with the family's prefix."""
  return not any(name.startswith(_PREFIXES[model_type]) for name in names)


def without_prefix(model_type: str, name: str) -> str:
  """The name as files of a model without a head have it."""
  return name.removeprefix(_PREFIXES[model_type])
