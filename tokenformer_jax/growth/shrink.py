"""Shrinking, the opposite of growth: the least used parameter tokens are removed.

A token's use is its mean absolute contribution to its layer's output (`growth.usage`), measured on data, for each layer
by itself. Untrained rows of exact or live growth contribute nothing, and of tokens that are used alike the newest are
removed first, so that shrinking undoes growth. τ follows, so that the weights of the tokens that stay do not change on
average; it stays where the removed tokens score 0.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.layers import TokenLayer, layer_of, new_counts, path_name, token_layers, with_counts
from tokenformer_jax.growth.plan import counts_of, layers_of
from tokenformer_jax.growth.usage import Usage, batch_parts, tau_factor, token_usage
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tau, split
from tokenformer_jax.nn.pattention import require_float_tokens


@dataclasses.dataclass(frozen=True)
class Kept:
  """What stays of one layer.

  Attributes:
    rows: indices of the tokens that stay, rising, [n] or [layer, n]; None where all of them do.
    tau_factor: the factor on τ, [] or [layer].
    parameters: the names of the parameters that have these rows.
  """

  rows: np.ndarray | None
  tau_factor: np.ndarray
  parameters: tuple[str, ...] = ("keys", "values")


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
  """What shrinking did; prints as a table.

  Attributes:
    tokens: path of a layer -> (tokens before, after, the share of its use that was removed).
    num_parameters: before and after.
    losses: on the held-out data, before and after; None for a model whose loss is not known.
  """

  tokens: dict[str, tuple[int, int, float]]
  num_parameters: tuple[int, int]
  losses: tuple[float, float] | None

  def __str__(self) -> str:
    width = max(len("tokens of"), *map(len, self.tokens))
    lines = [f"{'tokens of'.ljust(width)}  before  after  use removed"]
    for path, (old, new, share) in self.tokens.items():
      lines.append(f"{path.ljust(width)}  {old:6}  {new:5}  {share:11.2%}")
    old, new = self.num_parameters
    lines.append(f"parameters: {old:,} -> {new:,}")
    if self.losses is not None:
      before, after = self.losses
      lines.append(f"loss: {before:.4f} -> {after:.4f} nats a token ({after - before:+.4f})")
    return "\n".join(lines)


def shrink(
  model: nnx.Module,
  batches: Iterable,
  held_out: Iterable | None = None,
  counts: Mapping[str, int] | None = None,
  *,
  apply: Callable[[Any, Any], Any] | None = None,
  loss: Callable[[Any, Any], Any] | None = None,
  **named_counts: int | None,
) -> tuple[Any, ShrinkReport]:
  """A smaller copy of any NNX model that contains `Pattention` layers.

      smaller, report = tf.shrink(model, batches, ffn_tokens=512)

  Args:
    model: it is not changed.
    batches: data to measure use on; see `growth.usage.token_usage`.
    held_out: data for the report's loss; by default `batches`.
    counts, named_counts: new numbers of tokens, as in `tf.grow`; layers that are not named keep theirs.
    apply: `(model, batch) -> anything`, the forward pass of a model that is no `LanguageModel`; by default
      `model(batch)`.
    loss: `(model, batch) -> []`, the loss of such a model; without it the report has none.

  Returns:
    (smaller model, report).

  Raises:
    ValueError: numbers above the model's or all equal to them, no data, or a use that is not finite.
    TypeError: `model` is not an NNX module.
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(f"model is a {type(model).__name__}: expected an NNX module, e.g. tf.LanguageModel.")
  require_float_tokens(model, "shrunk")
  layers = token_layers(model)
  target = new_counts(layers, counts, named_counts)
  _check_counts(layers, target)
  batches = list(batches)
  kept, report = least_used(model, target, batches, batches if held_out is None else held_out, apply, loss)
  return _smaller(model, target, kept), report


def least_used(
  model: nnx.Module,
  counts: Mapping[str, int],
  batches: Iterable,
  held_out: Iterable,
  apply: Callable[[Any, Any], Any] | None = None,
  loss: Callable[[Any, Any], Any] | None = None,
) -> tuple[dict[str, Kept], ShrinkReport]:
  """What stays when the layers of `model` get `counts` tokens (by path), and what that costs; see `shrink`."""
  held_out = list(held_out)
  layers = token_layers(model)
  usage = token_usage(model, batches, apply)
  kept = most_used(usage, layers, counts)
  smaller = _smaller(model, counts, kept)
  losses = None
  if loss is not None:
    losses = _mean_loss(model, held_out, loss), _mean_loss(smaller, held_out, loss)
  elif isinstance(model, LanguageModel):
    losses = _language_model_loss(model, held_out), _language_model_loss(smaller, held_out)
  tokens = {
    path: (layers[path].num_tokens, counts[path], _lost(one.use, kept[path].rows)) for path, one in usage.items()
  }
  old_size, new_size = (
    sum(leaf.size for leaf in jax.tree.leaves(nnx.state(one, nnx.Param))) for one in (model, smaller)
  )
  return kept, ShrinkReport(tokens, (old_size, new_size), losses)


def check_shrink(config: ModelConfig, new_config: ModelConfig) -> None:
  """Raises ValueError unless `new_config` is `config` with fewer parameter tokens."""
  layers = layers_of(config)
  _check_counts(layers, counts_of(layers, new_config))


def _check_counts(layers: Mapping[str, TokenLayer], counts: Mapping[str, int]) -> None:
  if all(counts[path] == layer.num_tokens for path, layer in layers.items()):
    shown = {layer.count: layer.num_tokens for layer in layers.values()}
    raise ValueError(
      f"shrinking changes nothing: {', '.join(f'{name}={number}' for name, number in shown.items())} are the model's "
      "counts already; give at least one a smaller value."
    )
  for path, layer in layers.items():
    if counts[path] > layer.num_tokens:
      raise ValueError(
        f"{layer.count}: {layer.num_tokens} -> {counts[path]}: shrinking cannot add rows; choose at most "
        f"{layer.num_tokens}, or grow."
      )


def most_used(
  usage: Mapping[str, Usage], layers: Mapping[str, TokenLayer], counts: Mapping[str, int]
) -> dict[str, Kept]:
  """What stays of each layer: the most used tokens; of those that are used equally, the oldest."""
  kept = {}
  for path, one in usage.items():
    layer = layers[path]
    if counts[path] == layer.num_tokens:
      kept[path] = Kept(None, np.ones(one.use.shape[:-1]), tuple(layer.rows))
      continue
    rows = np.sort(np.argsort(-one.use, axis=-1, kind="stable")[..., : counts[path]], axis=-1)
    kept[path] = Kept(rows, tau_factor(layer, one.mass, rows), tuple(layer.rows))
  return kept


def shrink_tree(tree: Any, kept: Mapping[str, Kept]) -> Any:
  """A model's or training state's tree with what stays of its leaves."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: shrink_leaf(path_name(path), leaf, kept), tree)


def kept_of(path: str, kept: Mapping[str, Kept]) -> Kept | None:
  """What stays of the layer whose parameter or τ the leaf at `path` is or mirrors; None where the leaf stays as it is.

  Args:
    kept: what stays of all layers of the model.
  """
  layer = layer_of(path, kept)
  if layer is None or kept[layer].rows is None:
    return None
  is_parameter = path.rpartition("/")[2] in kept[layer].parameters
  return kept[layer] if is_parameter or path.startswith("tau/") else None


def shrink_leaf(path: str, leaf: Any, kept: Mapping[str, Kept], first_layer: int = 0) -> Any:
  """What stays of a leaf; of a stacked one possibly of a slice, its layers from `first_layer` on."""
  one = kept_of(path, kept)
  if one is None or one.rows is None:
    return leaf
  if path.startswith("tau/"):
    factor = one.tau_factor if leaf.ndim == 0 else one.tau_factor[first_layer : first_layer + leaf.shape[0]]
    return leaf * np.asarray(factor, leaf.dtype)
  if path.startswith("born/"):
    # Births are the same for all layers. Where the layers keep different rows it is the latest birth, whose warm-up is
    # the longest.
    return leaf[one.rows].reshape(-1, one.rows.shape[-1]).max(axis=0)
  take = (jnp if isinstance(leaf, jax.Array) else np).take_along_axis
  rows = one.rows if one.rows.ndim == 1 else one.rows[first_layer : first_layer + leaf.shape[0]]
  if leaf.ndim == rows.ndim:  # Biases of hidden units have no channels.
    return take(leaf, rows, axis=-1)
  return take(leaf, rows[..., None], axis=-2)


def _smaller(model: Any, counts: Mapping[str, int], kept: Mapping[str, Kept]) -> Any:
  graphdef, params, tau, rest = nnx.split(model, nnx.Param, Tau, ...)
  trees = shrink_tree({"params": nnx.to_pure_dict(params), "tau": nnx.to_pure_dict(tau)}, kept)
  nnx.replace_by_pure_dict(params, trees["params"])
  nnx.replace_by_pure_dict(tau, trees["tau"])
  smaller = nnx.merge(graphdef, params, tau, rest)
  with_counts(smaller, counts)
  return smaller


def _lost(use: np.ndarray, kept: np.ndarray | None) -> float:
  if kept is None:
    return 0.0
  return float(1 - np.take_along_axis(use, kept, axis=-1).sum() / max(use.sum(), 1e-300))


def _language_model_loss(model: LanguageModel, batches: list) -> float:
  graphdef, *weights = split(model)

  @jax.jit
  def sums(weights, inputs, labels, mask, *where):
    nats = optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graphdef, *weights)(inputs, *where), labels)
    return jnp.sum(nats * mask), jnp.sum(mask)

  each = [jax.device_get(sums(weights, *batch_parts(batch))) for batch in batches]
  total = np.asarray(each, np.float64).sum(axis=0)
  return float(total[0] / total[1])


def _mean_loss(model: nnx.Module, batches: list, loss: Callable[[Any, Any], Any]) -> float:
  graphdef, state = nnx.split(model)
  of_batch = jax.jit(lambda state, batch: loss(nnx.merge(graphdef, state), batch))
  return float(np.mean([jax.device_get(of_batch(state, batch)) for batch in batches]))
