"""Dense checkpoints of Hugging Face: the same function and gradients, and the same arrays when they are written back."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokenformer_jax.interop.hugging_face import model_from, to_hugging_face
from tokenformer_jax.interop.hugging_face_config import config_json, model_config
from tokenformer_jax.nn.parameters import split

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
FAMILIES = ("gpt_neox", "gpt2", "llama")


@functools.cache
def golden(family):
  """(config.json, parameters, all arrays) of a model that transformers 5.23.0 was run on."""
  arrays = dict(np.load(GOLDEN / f"{family}_A.npz"))
  fields = json.loads((GOLDEN / f"{family}_A.json").read_text())["config"]
  return fields, {name[6:]: array for name, array in arrays.items() if name.startswith("param/")}, arrays


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family):
  fields, parameters, arrays = golden(family)
  graphdef, ours, tau = split(model_from(fields, parameters))
  tokens, labels = (jnp.asarray(arrays[name], jnp.int32) for name in ("input_ids", "labels"))

  def loss(ours):
    logits = nnx.merge(graphdef, ours, tau)(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  d_ours, logits = jax.jit(jax.grad(loss, has_aux=True))(ours)
  assert np.abs(logits - arrays["logits__f64"]).max() < 2e-5
  gradients = to_hugging_face(d_ours, fields, list(parameters))
  assert gradients.keys() == parameters.keys()
  for name, gradient in gradients.items():
    expected = arrays[f"grad/{name}__f64"]
    assert np.abs(gradient - expected).max() < 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_written_as_it_was_read(family):
  config = model_config(golden(family)[0])
  assert model_config(config_json(config)) == config
