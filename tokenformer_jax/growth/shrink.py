"""Shrinking: the opposite of growth. Parameter tokens are removed, the least used first; τ stays.

A token's use is its mean absolute contribution to its layer's output, E|w_n| · ‖v_n‖₂ for weights
w = Θ(x Kᵀ), measured on data, for each layer by itself. Rows that exact growth added and that were not
trained weigh nothing, and of tokens that are used alike the newest go first, so shrinking undoes growth.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.plan import TOKEN_FIELDS, leaves_by_path, path_name
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, token_weights

Usage = dict[str, np.ndarray]  # Path of a pattention layer, as `blocks/ffn` -> [layer, N].
Kept = dict[str, np.ndarray]  # The same -> the tokens that stay, [layer, n], rising.


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
  """What shrinking did; prints as a table.

  Attributes:
    tokens: path of a pattention layer -> (tokens before, after, the share of its use that went).
    num_parameters: before and after.
    losses: nats a token on the held-out data, before and after.
  """

  tokens: dict[str, tuple[int, int, float]]
  num_parameters: tuple[int, int]
  losses: tuple[float, float]

  def __str__(self) -> str:
    width = max(map(len, self.tokens))
    lines = [f"{'tokens of'.ljust(width)}  before  after  use that went"]
    for path, (old, new, share) in self.tokens.items():
      lines.append(f"{path.ljust(width)}  {old:6}  {new:5}  {share:13.2%}")
    (old, new), (before, after) = self.num_parameters, self.losses
    return "\n".join(
      [
        *lines,
        f"parameters: {old:,} -> {new:,}",
        f"loss: {before:.4f} -> {after:.4f} nats a token ({after - before:+.4f})",
      ]
    )


def shrink(
  model: LanguageModel,
  batches: Iterable,
  held_out: Iterable | None = None,
  *,
  qkv_tokens: int | None = None,
  proj_tokens: int | None = None,
  ffn_tokens: int | None = None,
) -> tuple[LanguageModel, ShrinkReport]:
  """A smaller model: `smaller, report = shrink(model, batches, ffn_tokens=512)`.

  Args:
    batches: data to measure use on: token ids int [B, T], or `data.Batch`es; T at least 2.
    held_out: data for the report's loss; by default `batches`.
    qkv_tokens, proj_tokens, ffn_tokens: new counts; those not given stay.

  Raises:
    ValueError: counts above the model's or all equal to them, no data, or a use that is not finite.
  """
  given = dict(qkv_tokens=qkv_tokens, proj_tokens=proj_tokens, ffn_tokens=ffn_tokens)
  config = model.config.grown(**{name: count for name, count in given.items() if count is not None})
  check_shrink(model.config, config)
  batches = list(batches)
  kept, report = least_used(model, config, batches, batches if held_out is None else held_out)
  return _smaller(model, config, kept), report


def least_used(
  model: LanguageModel, config: ModelConfig, batches: Iterable, held_out: Iterable
) -> tuple[Kept, ShrinkReport]:
  """Which tokens stay when `model` is shrunk to `config`, and what that costs; arguments as of `shrink`."""
  held_out = list(held_out)
  usage = token_usage(model, batches)
  kept = most_used(usage, config)
  losses = (_loss(model, held_out), _loss(_smaller(model, config, kept), held_out))
  tokens = {path: (use.shape[1], kept[path].shape[1], _lost(use, kept[path])) for path, use in usage.items()}
  return kept, ShrinkReport(tokens, (model.config.num_parameters, config.num_parameters), losses)


def _smaller(model: LanguageModel, config: ModelConfig, kept: Kept) -> LanguageModel:
  _, params, tau = split(model)
  graphdef, *_ = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, shrink_tree(params, kept), tau)


def check_shrink(config: ModelConfig, new_config: ModelConfig) -> None:
  """Raises ValueError unless `new_config` is `config` with fewer parameter tokens."""
  if new_config == config:
    raise ValueError(
      "shrinking changes nothing: "
      + ", ".join(f"{f}={getattr(config, f)}" for f in TOKEN_FIELDS)
      + " are the model's counts already; give at least one a smaller value."
    )
  for field in TOKEN_FIELDS:
    old, new = getattr(config, field), getattr(new_config, field)
    if new > old:
      raise ValueError(f"{field}: {old} -> {new}: shrinking cannot add rows; choose at most {old}, or grow.")


def token_usage(model: LanguageModel, batches: Iterable) -> Usage:
  """E|w_n| · ‖v_n‖₂ of every parameter token, by pattention layer, over all positions of `batches`."""
  graphdef, params, tau = split(model)

  @jax.jit
  def sums(params, tau, inputs, positions, segments):
    def count(block, x, by, segments):
      seen = {}
      for path, layer in list(nnx.iter_modules(block)):
        if isinstance(layer, Pattention):
          parent = block
          for name in path[:-1]:
            parent = getattr(parent, name)
          # Past NNX, which this throw-away block need not know of.
          object.__setattr__(parent, path[-1], _counting(layer, seen, "/".join(["blocks", *map(str, path)])))
      return block(x, by, segments, remat=lambda f: f), seen

    return nnx.merge(graphdef, params, tau).through_layers(count, inputs, positions, segments)[1]

  total, positions = None, 0
  for batch in batches:
    inputs, _, _, *where = _parts(batch)
    if inputs.min() < 0 or inputs.max() >= model.config.vocab_size:
      raise ValueError(
        f"batches: ids from {inputs.min()} to {inputs.max()}; expected 0 to "
        f"{model.config.vocab_size - 1}, the model's vocabulary."
      )
    seen = jax.device_get(sums(params, tau, inputs, *where))
    seen = {path: array.astype(np.float64) for path, array in seen.items()}
    total = seen if total is None else {path: total[path] + seen[path] for path in total}
    positions += inputs.size
  if total is None:
    raise ValueError("batches: there are none; use is measured on data.")
  norms = {
    path: np.linalg.norm(np.asarray(leaves_by_path(params)[f"{path}/values"], np.float64), axis=-1) for path in total
  }
  usage = {path: norms[path] * total[path] / positions for path in total}
  for path, use in usage.items():
    if not np.all(np.isfinite(use)):
      raise ValueError(f"{path}: its use on this data is not finite; the model is broken, take an earlier checkpoint.")
  return usage


def _counting(layer: Pattention, seen: dict[str, jax.Array], path: str):
  def call(x):
    tokens = ParameterTokens(layer.keys[...], layer.values[...], layer.tau[...])
    weights_MxN = token_weights(x, tokens, layer.theta, layer.gelu)
    seen[path] = jnp.sum(jnp.abs(weights_MxN), axis=0)
    return layer(x)

  return call


def most_used(usage: Usage, config: ModelConfig) -> Kept:
  """The tokens that stay, of each layer the most used; used alike, the oldest."""
  fields = {"ffn": "ffn_tokens", "proj": "proj_tokens"}
  return {
    path: np.sort(
      np.argsort(-use, axis=1, kind="stable")[:, : getattr(config, fields.get(path.rsplit("/", 1)[-1], "qkv_tokens"))],
      axis=1,
    )
    for path, use in usage.items()
  }


def shrink_tree(tree: Any, kept: Kept) -> Any:
  """A training state, or a part of one, with these rows of parameters, moments and births."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: shrink_leaf(path_name(path), leaf, kept), tree)


def rows_kept(path: str, kept: Kept) -> np.ndarray | None:
  """The rows of a leaf that stay, None where all do."""
  return next((rows for name, rows in kept.items() if path.endswith((f"{name}/keys", f"{name}/values"))), None)


def shrink_leaf(path: str, leaf: jax.Array, kept: Kept, first_layer: int = 0) -> jax.Array:
  """The rows of a leaf that stay; of a stacked one possibly a slice, its layers from `first_layer` on."""
  rows = rows_kept(path, kept)
  if rows is None:
    return leaf
  if leaf.ndim == 1:
    # Births are the same for all layers: where layers keep others, the latest, whose warm-up is the longest.
    return leaf[rows].max(axis=0)
  rows = rows[first_layer : first_layer + leaf.shape[0]]
  return (jnp if isinstance(leaf, jax.Array) else np).take_along_axis(leaf, rows[..., None], axis=1)


def _lost(use: np.ndarray, kept: np.ndarray) -> float:
  return float(1 - np.take_along_axis(use, kept, axis=1).sum() / max(use.sum(), 1e-300))


def _loss(model: LanguageModel, batches: list) -> float:
  graphdef, *weights = split(model)

  @jax.jit
  def sums(weights, inputs, labels, mask, *where):
    nats = optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graphdef, *weights)(inputs, *where), labels)
    return jnp.sum(nats * mask), jnp.sum(mask)

  nats, weight = np.sum([jax.device_get(sums(weights, *_parts(batch))) for batch in batches], axis=0, dtype=np.float64)
  return float(nats / weight)


def _parts(batch) -> tuple:
  """(inputs, labels, weights, positions, segments) of a `data.Batch` or of token ids [B, T]."""
  if hasattr(batch, "inputs"):
    weights = np.ones(batch.labels.shape, np.float32) if batch.weights is None else batch.weights
    return batch.inputs, batch.labels, weights, batch.positions, batch.segments
  ids = np.asarray(batch)
  if ids.ndim != 2 or ids.shape[1] < 2 or not math.prod(ids.shape):
    raise ValueError(f"batch {ids.shape}: expected token ids [B, T] with T of at least 2.")
  return ids[:, :-1], ids[:, 1:], np.ones((ids.shape[0], ids.shape[1] - 1), np.float32), None, None
