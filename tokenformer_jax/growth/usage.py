"""How much a model uses each of its parameter tokens, measured on data."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.growth.layers import TokenLayer, leaves_by_path, token_layers
from tokenformer_jax.kernels.products import row_products
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.depth_routing import RoutedBlock
from tokenformer_jax.nn.experts import Experts
from tokenformer_jax.nn.feed_forward import MLP
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import recorded_inputs
from tokenformer_jax.nn.token_groups import TokenGroups
from tokenformer_jax.parameter_tokens import ParameterTokens, token_weights


@dataclasses.dataclass(frozen=True)
class Usage:
  """What one layer makes of its tokens; both arrays float64 [N], or [layer, N] for a stack of layers.

  Attributes:
    use: E|w_n| · ‖v_n‖₂, a token's mean absolute contribution to the output, for weights w = Θ(x Kᵀ).
    mass: the token's part of what Θ normalises by: E s_n² for l2_norm_gelu, E g_n² / ‖g‖² for gelu_l2_norm, E p_n for
      softmax, up to a factor that all tokens share; 0 for hidden units, which are not normalised.
  """

  use: np.ndarray
  mass: np.ndarray


def token_usage(
  model: nnx.Module, batches: Iterable, apply: Callable[[Any, Any], Any] | None = None
) -> dict[str, Usage]:
  """The usage of every layer, by its path, over all positions of `batches` that are not padding.

  Args:
    model: a language model, or any NNX model with `Pattention` layers whose forward pass is not under `jax.lax.scan`.
    batches: for a language model token ids int [B, T] or `data.Batch`es; for another model what `apply` takes.
    apply: `(model, batch) -> anything`, the forward pass of another model; by default `model(batch)`.

  Raises:
    ValueError: no batches, ids outside the vocabulary, a layer that the forward pass does not reach, or a use that is
      not finite.
  """
  for _, module in nnx.iter_modules(model):
    if isinstance(module, (Experts, RoutedBlock, TokenGroups)):
      raise ValueError(
        f"the model has a router ({type(module).__name__}), whose rows see only some of the tokens: their use is not "
        "measured, so it cannot be shrunk; grow a smaller model instead."
      )
  if hasattr(model, "through_layers") and not isinstance(model, LanguageModel):
    raise ValueError(
      f"model is a {type(model).__name__}, whose layers run under a scan: use is measured for a LanguageModel alone, so it "
      "cannot be shrunk; grow a smaller model instead."
    )
  layers = token_layers(model)
  sums_of = _language_model_sums(model) if isinstance(model, LanguageModel) else _sums(model, apply)
  total: dict[str, Any] = {}
  for batch in batches:
    sums = jax.tree.map(lambda array: np.asarray(array, np.float64), jax.device_get(sums_of(batch)))
    total = jax.tree.map(np.add, total, sums) if total else sums
  if not total:
    raise ValueError("batches: there are none; use is measured on data.")
  if missing := [path for path in layers if path not in total]:
    raise ValueError(f"{missing[0]}: the forward pass does not reach this layer; leave it out, or give `apply`.")
  values = leaves_by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  usage = {}
  for path, (absolute, mass, rows) in total.items():
    norms = np.linalg.norm(np.asarray(values[f"{path}/values".lstrip("/")], np.float64), axis=-1)
    rows = np.asarray(rows)[..., None]
    usage[path] = Usage(norms * absolute / rows, mass / rows)
    if not np.all(np.isfinite(usage[path].use)):
      raise ValueError(f"{path}: its use on this data is not finite; the model is broken, take an earlier checkpoint.")
  return usage


def _language_model_sums(model: LanguageModel) -> Callable[[Any], dict]:
  graphdef, params, tau = split(model)

  @jax.jit
  def sums(params, tau, inputs, real, positions, segments):
    def count(block, x, context):
      with recorded_inputs() as recorded:
        x, _, _ = block(x, context.observed())
      return x, _by_path(block, recorded, real)

    observed = nnx.merge(graphdef, params, tau).through_layers(count, inputs, positions, segments)[1]
    return {f"{root}/{path}": sums for root, layers in observed.items() for path, sums in layers.items()}

  def of_batch(batch):
    inputs, _, _, positions, segments = batch_parts(batch)
    if inputs.min() < 0 or inputs.max() >= model.config.vocab_size:
      raise ValueError(
        f"batches: ids from {inputs.min()} to {inputs.max()}; expected 0 to "
        f"{model.config.vocab_size - 1}, the model's vocabulary."
      )
    real = np.ones(inputs.shape, np.float32) if segments is None else (np.asarray(segments) > 0).astype(np.float32)
    return sums(params, tau, inputs, real, positions, segments)

  return of_batch


def _sums(model: nnx.Module, apply: Callable[[Any, Any], Any] | None) -> Callable[[Any], dict]:
  graphdef, state = nnx.split(model)
  apply = apply or (lambda model, batch: model(batch))

  @jax.jit
  def sums(state, batch):
    merged = nnx.merge(graphdef, state)
    with recorded_inputs() as recorded:
      apply(merged, batch)
    return _by_path(merged, recorded, None)

  return lambda batch: sums(state, batch)


def _by_path(module: nnx.Module, recorded: list[tuple[nnx.Module, jax.Array]], real: jax.Array | None) -> dict:
  """(Σ|w|, Σ mass, number of rows) of each recorded layer, by its path below `module`."""
  paths = {id(layer): "/".join(map(str, path)) for path, layer in nnx.iter_modules(module)}
  found: dict[str, tuple] = {}
  for layer, x in recorded:
    rows_M = jnp.ones(x.size // x.shape[-1]) if real is None else jnp.reshape(real, -1)
    weights_MxN, mass_MxN = weights_and_mass(layer, x)
    sums = (rows_M @ jnp.abs(weights_MxN), rows_M @ mass_MxN, jnp.sum(rows_M))
    path = paths[id(layer)]
    found[path] = tuple(map(jnp.add, found[path], sums)) if path in found else sums
  return found


def weights_and_mass(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The weights of a layer's values for each row of x, and each row's part of what they are normalised by; both [M, N]."""
  if isinstance(layer, MLP):
    weights_MxN = layer.hidden_units(x.reshape(-1, x.shape[-1]))
    return weights_MxN, jnp.zeros_like(weights_MxN)
  tokens = ParameterTokens(layer.keys[...], layer.values[...], layer.tau[...])
  weights_MxN = token_weights(x, tokens, layer.theta, layer.gelu)
  match layer.theta:
    case "l2_norm_gelu":
      return weights_MxN, jnp.square(row_products(x.reshape(-1, x.shape[-1]), tokens.keys.astype(x.dtype)))
    case "gelu_l2_norm":
      return weights_MxN, jnp.square(weights_MxN)
  return weights_MxN, weights_MxN


def tau_factor(layer: TokenLayer, mass: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """The factor on τ that leaves the weights of the kept tokens where they were, on average; [] or [layer].

  Removing tokens makes Θ's norm smaller and would so enlarge all weights that are left. The factor is exactly 1 where
  the removed tokens score 0.

  Args:
    mass: `Usage.mass`, [..., N].
    kept: indices of the kept tokens, [..., n].
  """
  total = mass.sum(axis=-1)
  share = np.take_along_axis(mass, kept, axis=-1).sum(axis=-1) / np.where(total > 0, total, 1.0)
  share = np.where(total > 0, share, 1.0)
  return share if layer.theta == "softmax" else np.sqrt(share)


def batch_parts(batch: Any) -> tuple:
  """(inputs, labels, weights, positions, segments) of a `data.Batch` or of token ids [B, T], T at least 2."""
  if hasattr(batch, "inputs"):
    weights = np.ones(batch.labels.shape, np.float32) if batch.weights is None else batch.weights
    return batch.inputs, batch.labels, weights, batch.positions, batch.segments
  ids = np.asarray(batch)
  if ids.ndim != 2 or ids.shape[1] < 2 or not ids.shape[0]:
    raise ValueError(f"batch {ids.shape}: expected token ids [B, T] with T of at least 2.")
  return ids[:, :-1], ids[:, 1:], np.ones((ids.shape[0], ids.shape[1] - 1), np.float32), None, None
