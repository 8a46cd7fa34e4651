"""The language model of arXiv 2410.23168 in float64 NumPy, written from the paper's formulas and not from our code.

Weights are a flat dict under the released names. Every function also takes complex arrays, so that derivatives are
exact: the slope along d is f'(x) · d = Im f(x + i·h·d) / h for a tiny h (`slope`).
"""

import math

import numpy as np
from scipy import special

_STEP = 1e-40


def log_cdf(x, kind):
  """The logarithm of GeLU(x) / x: log Φ(x), or for tanh log sigmoid(2√(2/π)(x + 0.044715 x³))."""
  if kind == "erf":
    return special.log_ndtr(x)
  z = 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
  return np.where(z.real < 0, z, 0.0) - np.log1p(np.exp(np.where(z.real < 0, z, -z)))


def weights(scores, theta, tau, kind="erf"):
  """Θ of each row of scores."""
  if theta == "l2_norm_gelu":
    unit = tau * scores / _norm(scores)
    return unit * np.exp(log_cdf(unit, kind))
  if theta == "gelu_l2_norm":
    # A common factor of the row cancels. Dividing by it keeps GeLU from underflowing where all scores are far below 0.
    log_factor = log_cdf(scores, kind)
    g = scores * np.exp(log_factor - log_factor.real.max(axis=-1, keepdims=True))
    return tau * g / _norm(g)
  exps = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
  return tau * exps / exps.sum(axis=-1, keepdims=True)


def pattention(x, keys, values, theta="l2_norm_gelu", tau=None, kind="erf"):
  """Θ(x Kᵀ) V; τ by default √n, and n for softmax."""
  if tau is None:
    tau = len(keys) if theta == "softmax" else math.sqrt(len(keys))
  return weights(x @ keys.T, theta, tau, kind) @ values


def layer_norm(x):
  """Zero mean, unit biased variance, ε = 1e-5."""
  centred = x - x.mean(axis=-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


def rotary(x, positions, dims, base):
  """x [B, T, heads, channels]: r · cos + rotate_half(r) · sin on the first `dims` channels."""
  frequencies = base ** (-np.arange(0, dims, 2) / max(dims, 1))
  angles = np.concatenate([positions[..., None] * frequencies] * 2, axis=-1)[:, :, None, :]
  r = x[..., :dims]
  half = np.concatenate([-r[..., dims // 2 :], r[..., : dims // 2]], axis=-1)
  return np.concatenate([r * np.cos(angles) + half * np.sin(angles), x[..., dims:]], axis=-1)


def attention(q, k, v, visible):
  """Softmax attention [B, T, heads, channels] with scale 1/√channels; visible[b, t, s] says whether t sees s."""
  scores = np.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
  exps = np.where(visible[:, None], np.exp(scores - scores.real.max(axis=-1, keepdims=True)), 0.0)
  return np.einsum("bhts,bshc->bthc", exps / exps.sum(axis=-1, keepdims=True), v)


def language_model(arrays, tokens, config, positions=None, segments=None):
  """Logits [B, T, V] of a model with `config`'s heads, Θ and rotary settings."""
  batch, time = tokens.shape
  positions = np.tile(np.arange(time), (batch, 1)) if positions is None else positions
  segments = np.zeros_like(tokens) if segments is None else segments
  visible = np.tril(np.ones((time, time), bool)) & (segments[:, :, None] == segments[:, None, :])
  dims = int(config.hidden_size // config.num_heads * config.rotary_fraction)

  def patt(name, x):
    return pattention(
      x, arrays[f"{name}.key_param_tokens"], arrays[f"{name}.value_param_tokens"], config.theta, kind=config.gelu
    )

  def rotate(x):
    return rotary(x, positions, dims, config.rotary_base)

  embedding = arrays["sequential.0.word_embeddings.weight"]
  x = embedding[tokens]
  for i in range(2, config.num_layers + 2):
    u = layer_norm(x)
    q, k, v = (
      patt(f"sequential.{i}.attention.{name}", u).reshape(batch, time, config.num_heads, -1)
      for name in ("query", "key", "value")
    )
    x = x + patt(f"sequential.{i}.attention.proj", attention(rotate(q), rotate(k), v, visible).reshape(x.shape))
    x = x + patt(f"sequential.{i}.mlp", layer_norm(x))
  norm = f"sequential.{config.num_layers + 3}.norm"
  return (layer_norm(x) * arrays[f"{norm}.weight"] + arrays[f"{norm}.bias"]) @ embedding.T


def cross_entropy(logits, labels):
  """Mean over all positions of −log softmax(logits)[label]."""
  shifted = logits - logits.real.max(axis=-1, keepdims=True)
  log_z = np.log(np.exp(shifted).sum(axis=-1))
  return (log_z - np.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]).mean()


def slope(function, x, direction):
  """The derivative of `function` at x along `direction`, to float64's precision."""
  return function(x + 1j * _STEP * direction).imag / _STEP


def wide(arrays):
  """A dict of arrays, each in float64."""
  return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def _norm(x):
  return np.sqrt((x**2).sum(axis=-1, keepdims=True))
