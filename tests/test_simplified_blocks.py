"""The simplified blocks of arXiv 2311.01906: what a new model is, which of its parameters are decayed, and how many it has."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.presets import LANGUAGE_MODELS
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.attention import Attention
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import split

SIZES = dict(vocab_size=24, num_layers=3, hidden_size=16, num_heads=2, ffn_tokens=24, seq_length=8)
# One preset for each kind of value, shaping and topology.
SHAPED = ("v-skipinit-eq4", "sas", "sas-p", "sas-eq6")


@functools.cache
def new_parameters(preset):
  """Path -> array of a new small model."""
  config = ModelConfig.named("tiny", preset, **SIZES)
  parameters = jax.jit(lambda: split(LanguageModel(config, rngs=nnx.Rngs(0)))[1])()
  return {path: np.asarray(a) for path, a in traverse_util.flatten_dict(parameters, sep="/").items()}


def ending(parameters, *ends):
  return {path: a for path, a in parameters.items() if path.endswith(ends)}


# Trainable parameters in millions of 18 blocks of 768 channels with the paper's vocabulary, as the original code prints them.
@pytest.mark.parametrize(
  "preset, millions",
  [
    ("pre-ln", "166.645"),
    ("parallel", "166.645"),
    ("v-skipinit", "166.646"),
    ("sas", "146.002"),
    ("sas-p", "146.002"),
    ("sas-p-no-norm", "145.976"),
  ],
)
def test_parameters_of_the_papers_models(preset, millions):
  layers, size = 18, 768
  config = ModelConfig.named(
    "150m",
    preset,
    vocab_size=50_000,
    num_layers=layers,
    hidden_size=size,
    num_heads=12,
    ffn_tokens=3072,
    seq_length=1024,
  )
  # Parallel blocks of the original also have a second norm, which they never use, and count it.
  unused = layers * size if config.residual.parallel and config.norm != "none" else 0
  assert f"{(config.num_parameters + unused) / 1e6:.3f}" == millions


@pytest.mark.parametrize("preset", [*LANGUAGE_MODELS, "bert"])
def test_matrices_are_decayed_and_gains_biases_and_norms_are_not(preset):
  model = abstract_model(ModelConfig.named("tiny", preset, **SIZES | dict(num_layers=4)))
  for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    axes = [axis for axis in parameter.axes if axis != "layer"]
    assert parameter.decayed == (len(axes) >= 2), path


@pytest.mark.parametrize("preset", SHAPED)
def test_gains_of_a_new_model(preset):
  parameters = new_parameters(preset)
  initial = {
    "attention_gain/gain": 1.0,
    "ffn_gain/gain": 0.1,
    "ffn_skip/gain": 1.0,
    "value/alpha": 1.0,
    "proj/alpha": 1.0,
  }
  initial |= {"value/beta": 0.2, "proj/beta": 0.2} if preset == "sas-eq6" else {"value/beta": 1.0}
  initial |= {"shaping/alpha": 1.0, "shaping/gamma": 1.0, "shaping/beta": 0.0 if preset == "v-skipinit-eq4" else 1.0}
  gains = {path: a for path, a in parameters.items() if path.rpartition("/")[2] in ("gain", "alpha", "beta", "gamma")}
  for path, gain in gains.items():
    name = "/".join(path.split("/")[-2:])
    np.testing.assert_array_equal(gain, np.float32(initial[name]), err_msg=path)
  # An absent skip has no gain, so that it can never become one.
  assert not ending(parameters, "attention_skip/gain")
  assert bool(ending(parameters, "ffn_skip/gain")) == (not preset.startswith("sas-p"))


@pytest.mark.parametrize("preset", SHAPED)
def test_attention_of_a_new_model_is_the_identity(preset):
  """Queries are 0, so the matrix is α I + β C − γ C = I up to rounding, and values pass through their matrices alone."""
  config = ModelConfig.named("tiny", preset, **SIZES)
  x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
  context = Context(jnp.arange(8)[None])

  @jax.jit
  def attended(x):
    layer = Attention(config, is_first=True, rngs=nnx.Rngs(0))
    through = lambda x: x if layer.proj is None else layer.proj(x)  # noqa: E731
    return layer.mix(*layer.project(x, context), context)[0], through(layer.value(x))

  y, expected = attended(x)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
  if config.attention.values.startswith("identity"):
    np.testing.assert_array_equal(expected, x)


def test_values_and_outputs_of_v_skipinit_begin_as_independent_orthogonal_matrices():
  matrices = ending(new_parameters("v-skipinit-eq4"), "value/weight", "proj/weight")
  assert len(matrices) == 2
  layers = np.concatenate(list(matrices.values()))
  assert layers.shape == (6, 16, 16)
  np.testing.assert_allclose(layers @ layers.swapaxes(1, 2), np.broadcast_to(np.eye(16), layers.shape), atol=1e-5)
  between = np.abs(np.einsum("iab,jab->ij", layers, layers) / 16 - np.eye(6))
  assert between.max() < 0.6


def test_only_the_first_layer_of_sas_has_a_value_projection():
  parameters = new_parameters("sas")
  assert ending(parameters, "value/projection/weight").keys() == {"first/attention/value/projection/weight"}
  assert not ending(parameters, "proj/weight")


def test_the_first_value_projection_is_alpha_x_plus_beta_x_w():
  layer = Attention(ModelConfig.named("tiny", "sas", **SIZES), is_first=True, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(16, 16)).astype(np.float32)
  layer.value.projection.weight[...], layer.value.alpha[...], layer.value.beta[...] = (
    w,
    np.float32(0.5),
    np.float32(-2.0),
  )
  np.testing.assert_allclose(layer.value(x), 0.5 * x - 2.0 * (x.astype(np.float64) @ w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", SHAPED)
def test_matrices_begin_at_002_without_a_factor_for_the_depth(preset):
  parameters = new_parameters(preset)
  assert not any(a.any() for a in ending(parameters, "query/weight", "projection/weight", "bias").values())
  for path, a in ending(parameters, "key/weight", "ffn/keys", "ffn/values", "embedding").items():
    assert abs(a.std() / 0.02 - 1) < 5 / math.sqrt(a.size), path
