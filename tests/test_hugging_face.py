"""Dense checkpoints of Hugging Face: the same function and gradients, and the same arrays when they are written back."""

import dataclasses

import pytest

from tests import parity_table
from tests.golden_files import GOLDEN, read, under
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.hugging_face_config import config_fields, model_config

FAMILIES = ("gpt_neox", "gpt2", "llama")


def golden(family):
  """(config.json, parameters) of a model that transformers 5.23.0 was run on."""
  file = read(GOLDEN / "dense" / f"{family}_A.npz")
  return file.description["config"], under(file.arrays, "param/")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family):
  (row,) = parity_table.rows_of(GOLDEN / "dense" / f"{family}_A.npz")
  assert row.passes and row.output is not None and row.gradient is not None, row


CONFIGS = [
  ModelConfig.named(
    "tiny", "gpt-neox", residual=dict(parallel=False), attention=dict(bias="none"), rotary_fraction=0.5
  ),
  ModelConfig.named("tiny", "gpt2", ffn=dict(activation="relu"), ffn_tokens=100, norm_epsilon=1e-6),
  ModelConfig.named(
    "tiny", "transformer", tied=True, rotary_base=5e5, attention=dict(num_kv_heads=1), ffn=dict(bias=True)
  ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=FAMILIES)
def test_every_supported_option_is_written_and_read(config):
  fields = config_fields(config)
  assert model_config(fields) == config
  # Earlier versions of transformers know only the names beside rope_parameters, and version 5 writes only these.
  fields.pop("rope_parameters", None)
  assert model_config(fields) == config


def test_sizes_that_are_left_out_have_the_defaults_of_transformers():
  neox = dict(vocab_size=96, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=128)
  assert model_config({"model_type": "gpt_neox", **neox}) == dataclasses.replace(
    model_config(golden("gpt_neox")[0]), seq_length=2048
  )
  gpt2 = model_config(dict(model_type="gpt2", vocab_size=96, n_layer=2, n_embd=32, n_head=4))
  assert gpt2 == dataclasses.replace(model_config(golden("gpt2")[0]), seq_length=1024)
  llama = model_config({"model_type": "llama", **neox})
  assert model_config({"model_type": "llama", **neox, "num_key_value_heads": 4}) == llama
  assert (llama.norm_epsilon, llama.num_kv_heads, llama.seq_length) == (1e-6, 4, 2048)


@pytest.mark.parametrize("preset", ["tokenformer", "sas", "pre-ln", "parallel"])
def test_other_architectures_have_no_configuration_of_transformers(preset):
  assert config_fields(ModelConfig.named("tiny", preset)) is None


@pytest.mark.parametrize(
  "family, changes, messages",
  [
    (
      "llama",
      dict(rope_scaling=dict(rope_type="llama3", factor=8.0), hidden_act="mish", quantization_config=dict(bits=4)),
      [
        "rope_scaling={'factor': 8.0, 'rope_type': 'llama3'} is not",
        "hidden_act='mish' is not",
        "quantization_config=",
      ],
    ),
    ("llama", dict(head_dim=16, hidden_size=32), ["head_dim=16 is not supported"]),
    ("llama", dict(num_key_value_heads=3), ["attention.num_kv_heads=3: must divide num_heads=4"]),
    ("llama", dict(rope_parameters=dict(rope_type="yarn")), ["rope_parameters={'rope_type': 'yarn'} is not supported"]),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True is not supported"]),
    (
      "gpt2",
      dict(n_layer="2", tie_word_embeddings=1),
      ["n_layer='2' is not a whole number", "tie_word_embeddings=1 is"],
    ),
    (
      "gpt_neox",
      dict(model_type="mistral"),
      ["model_type='mistral' is not supported; it must be one of gpt_neox, gpt2,"],
    ),
  ],
)
def test_one_line_names_all_that_is_not_supported(family, changes, messages):
  with pytest.raises(ValueError) as caught:
    model_config({**golden(family)[0], **changes})
  assert "\n" not in str(caught.value)
  for message in messages:
    assert message in str(caught.value)
