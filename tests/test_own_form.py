"""Models of architectures that nobody else has are saved and loaded as they are, whatever their parts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from tests.test_interop_pretrained import save as save_arrays
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.own_form import OWN_TAU_KEY
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.interop.save import save
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import split

SIZE = dict(vocab_size=16, num_layers=3, hidden_size=8, num_heads=2, seq_length=8)


def model_of(preset, projection, **tokens):
  """A model of random numbers."""
  config = ModelConfig.named("tiny", preset, projection, **SIZE, **tokens)
  graphdef, *trees = split(abstract_model(config))
  rng = np.random.default_rng(0)
  return nnx.merge(graphdef, *jax.tree.map(lambda leaf: rng.uniform(0.5, 2.0, leaf.shape).astype(leaf.dtype), trees))


def leaves(model):
  return [traverse_util.flatten_dict(tree, sep="/") for tree in split(model)[1:]]


# The first block of `sas` has gains and a value projection of its own; with parameter tokens it has τ.
@pytest.mark.parametrize(
  "preset, projection, tokens",
  [
    ("sas", "pattention", dict(qkv_tokens=5, ffn_tokens=6)),
    ("pre-ln", "", dict(ffn_tokens=6)),
    (
      "tokenformer",
      "",
      dict(embedding_norm="layer_norm", rotary_fraction=0.5, qkv_tokens=5, proj_tokens=4, ffn_tokens=6),
    ),
  ],
)
def test_every_leaf_comes_back(tmp_path, preset, projection, tokens):
  model = model_of(preset, projection, **tokens)
  path = save(model, tmp_path).path
  again = from_pretrained(path)
  assert again.config == model.config
  for tree, expected in zip(leaves(again), leaves(model)):
    assert tree.keys() == expected.keys()
    for name, leaf in tree.items():
      np.testing.assert_array_equal(np.asarray(leaf), expected[name], err_msg=name)
  assert "which alone reads them" in (tmp_path / "README.md").read_text()


def test_what_a_file_of_this_form_cannot_be(tmp_path):
  model = model_of("sas", "pattention", qkv_tokens=5, ffn_tokens=6)
  with pytest.raises(ValueError, match=r"a .bin has no place for its configuration; write a .safetensors"):
    save(model, tmp_path / "x.bin")
  path = save(model, tmp_path / "a").path
  faster = dataclasses.replace(model.config, compute_dtype="bfloat16")
  assert from_pretrained(path, faster).config == faster
  with pytest.raises(ValueError, match="another model: ffn_tokens=7 where the file has 6"):
    from_pretrained(path, dataclasses.replace(model.config, ffn_tokens=7))
  weights = open_weights(path)
  arrays = {name: array.read() for name, array in weights.arrays.items()}
  arrays["embedding"], arrays["blocks.x"] = arrays["embedding"][1:], arrays.pop("first.norm.scale")
  broken = save_arrays(tmp_path / "b.safetensors", arrays, metadata=weights.metadata)
  with pytest.raises(
    ValueError, match="missing 1: first.norm.scale; unexpected 1: 'blocks.x'.*; of another shape 1: emb"
  ):
    from_pretrained(broken)
  taus = json.loads(weights.metadata[OWN_TAU_KEY])
  taus["first/ffn/tau"] = -1.0
  metadata = {**weights.metadata, OWN_TAU_KEY: json.dumps(taus)}
  arrays = {name: array.read() for name, array in weights.arrays.items()}
  with pytest.raises(ValueError, match="expected positive numbers of the shapes"):
    from_pretrained(save_arrays(tmp_path / "c.safetensors", arrays, metadata=metadata))
