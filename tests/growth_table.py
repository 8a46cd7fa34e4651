"""How much growth changes the logits, per Θ and way: `python -m tests.growth_table` prints the table.

Models of random parameters of order one, 2 and 12 layers. Changes are the largest absolute difference over the largest
logit. `own error` is that of the float32 or bfloat16 model before growth against the same weights in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import split

# The ways that claim to keep the function.
CASES = [
  ("exact", "l2_norm_gelu"),
  ("exact", "gelu_l2_norm"),
  ("live", "l2_norm_gelu"),
  ("duplicate", "l2_norm_gelu"),
  ("duplicate", "gelu_l2_norm"),
  ("duplicate", "softmax"),
]
SHALLOW = ModelConfig(
  vocab_size=264, num_layers=2, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=16, seq_length=16
)
DEEP = dataclasses.replace(SHALLOW, num_layers=12, hidden_size=64, qkv_tokens=48, proj_tokens=48, ffn_tokens=192)
TOKENS = np.random.default_rng(0).integers(0, SHALLOW.vocab_size, (2, SHALLOW.seq_length))


def lively(config, seed=0):
  """A model with activations of order one, far from the initial ones, and τ as if it had grown before."""
  graphdef, params, tau = split(abstract_model(config))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
  return nnx.merge(
    graphdef, params, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 4, leaf.shape), jnp.float32), tau)
  )


def logits(model, dtype):
  """Logits of the model's weights when it computes in `dtype`; under float64 with weights widened first."""
  _, params, tau = split(model)
  wide = jnp.float64 if dtype == "float64" else jnp.float32
  params, tau = jax.tree.map(lambda leaf: leaf.astype(wide), (params, tau))
  graphdef, *_ = split(abstract_model(dataclasses.replace(model.config, compute_dtype=dtype)))
  return np.asarray(jax.jit(lambda params, tau: nnx.merge(graphdef, params, tau)(TOKENS))(params, tau), np.float64)


def change(method, theta, config, dtype):
  """(relative change of the logits by growth, own error of the model before it)."""
  with jax.enable_x64(True):
    model = lively(dataclasses.replace(config, theta=theta))
    if dtype == "float64":
      # So that parts of a value are as exact as the products.
      _, params, tau = split(model)
      model = nnx.merge(nnx.graphdef(model), *jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, tau)))
    bigger, _ = tf.grow(model, qkv_tokens=2 * config.qkv_tokens, ffn_tokens=3 * config.ffn_tokens, method=method)
    before, after, exact = logits(model, dtype), logits(bigger, dtype), logits(model, "float64")
  return tuple(np.max(np.abs(x - before)) / np.max(np.abs(before)) for x in (after, exact))


def main():
  print(
    "| way | Θ | float64, 2 layers | float32, 2 layers | float32, 12 layers (own error) "
    "| bfloat16, 12 layers (own error) |\n|---|---|---|---|---|---|"
  )
  for method, theta in CASES:
    shallow = [f"{change(method, theta, SHALLOW, dtype)[0]:.1e}" for dtype in ("float64", "float32")]
    deep = ["{:.1e} ({:.1e})".format(*change(method, theta, DEEP, dtype)) for dtype in ("float32", "bfloat16")]
    print("|", " | ".join([method, theta, *shallow, *deep]), "|")
  released = [
    f"{change('released', theta, SHALLOW, 'float32')[0]:.2f}" for theta in ("l2_norm_gelu", "gelu_l2_norm", "softmax")
  ]
  print("`released`, which does not, in float32 with 2 layers, for the three Θ:", ", ".join(released))


if __name__ == "__main__":
  main()
