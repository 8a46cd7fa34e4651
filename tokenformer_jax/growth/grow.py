"""Growth: the parameter tokens of a bigger model (arXiv 2410.23168, section 3.3 and appendix B).

Two methods keep the function for every input and let the new rows learn; `auto` chooses between them for each layer:

    exact   K_new = 0, V_new random. A zero key scores 0, so its weight is GeLU(0) = 0 and it adds nothing to the norm.
            Its gradient does not vanish, because its value is not zero.
    live    V_new = 0, K_new = √((n′ − n)/n) · O R  with  RᵀR = KᵀK  and random O, OᵀO = 1.  Then ‖K_new x‖² is
            (n′ − n)/n · ‖K x‖² for every x: ‖s‖ grows by √(n′/n), as τ does, so that the old weights stay. A new row
            adds nothing while its value is 0, and its gradient does not vanish, because its weight is not zero.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import GrowthConfig, ModelConfig
from tokenformer_jax.growth.layers import new_counts, path_name, token_layers, with_counts
from tokenformer_jax.growth.plan import LeafPlan, NewRows, plan_growth, plan_leaves
from tokenformer_jax.growth.report import GrowthReport
from tokenformer_jax.kernels.products import sum_dtype
from tokenformer_jax.nn.parameters import Tau
from tokenformer_jax.nn.pattention import require_float_tokens


def grow_state(
  state: Any,
  config: ModelConfig,
  new_config: ModelConfig,
  growth: GrowthConfig = GrowthConfig(),
  *,
  seed: int = 0,
  out_shardings: Any = None,
  donate: bool = False,
) -> tuple[Any, ModelConfig, GrowthReport]:
  """A training state with the parameter tokens of `new_config`.

  Under `auto`, `exact`, `live` and `duplicate` the function stays that of `config`. The moments of old rows are kept to
  the bit, those of new rows begin at 0, and the step count continues. Random rows depend on (seed, leaf, layer, old
  count) alone.

  Args:
    state: a dataclass pytree with `params` and `tau`, and whatever else a training state has (`training.state`).
    growth: how the new rows begin; its stages are not used.
    out_shardings: where the new leaves go, a tree like `state`; by default where JAX puts them.
    donate: free each old leaf as soon as its successor exists. The most that is held is then the new state and the
      largest old leaf, instead of both states.

  Returns:
    (state, new_config, report).

  Raises:
    ValueError: see `plan_growth` and `check_rank`; the old state is untouched then.
  """
  plan = plan_growth(state, config, new_config, growth)
  return _grown(state, plan, seed, out_shardings, donate), new_config, GrowthReport(tuple(plan.values()))


def grow(
  model: nnx.Module,
  counts: Mapping[str, int] | None = None,
  *,
  method: str = "auto",
  seed: int = 0,
  **named_counts: int | None,
) -> tuple[Any, GrowthReport]:
  """A bigger copy of any NNX model that contains `Pattention` layers::

      bigger, report = tf.grow(model, ffn_tokens=4096)          # a LanguageModel
      bigger, report = tf.grow(my_model, num_tokens=48)         # every Pattention without a count's name of its own
      bigger, report = tf.grow(my_model, {"layers/*/up": 48})   # some layers, by path

  Args:
    model: it is not changed. What is not a parameter token is shared with the copy's arrays.
    counts: path of a layer, or pattern of paths, -> its new number of tokens.
    method: `auto`, `exact`, `live` and `duplicate` keep the function, `released` does not; see `GrowthConfig`.
    seed: of the random new rows.
    named_counts: name of a count -> new number, e.g. `ffn_tokens=4096`; None for one that stays.

  Returns:
    (bigger model, report). `print(report.summary)` is one line, `print(report)` a table.

  Raises:
    ValueError: no such layer or count, fewer tokens than the model has, a method that cannot add them, or parameter
      tokens that are not floating point.
    TypeError: `model` is not an NNX module.
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(f"model is a {type(model).__name__}: expected an NNX module, e.g. tf.LanguageModel.")
  require_float_tokens(model, "grown")
  layers = token_layers(model)
  target = new_counts(layers, counts, named_counts)
  graphdef, params, tau, rest = nnx.split(model, nnx.Param, Tau, ...)
  trees = {"params": nnx.to_pure_dict(params), "tau": nnx.to_pure_dict(tau)}
  plan = plan_leaves(trees, layers, target, GrowthConfig(method=method))
  grown = _grown(trees, plan, seed)
  nnx.replace_by_pure_dict(params, grown["params"])
  nnx.replace_by_pure_dict(tau, grown["tau"])
  bigger = nnx.merge(graphdef, params, tau, rest)
  with_counts(bigger, target)
  return bigger, GrowthReport(tuple(plan.values()))


def _grown(tree: Any, plan: Mapping[str, LeafPlan], seed: int, out_shardings: Any = None, donate: bool = False) -> Any:
  step = np.int32(getattr(tree, "step", 0))
  check_rank(tree, plan)

  def grow(path: Any, leaf: Any, sharding: Any = None) -> Any:
    leaf_plan = plan[path_name(path)]
    if leaf_plan.new_rows is NewRows.NONE and sharding is None:
      return leaf
    program = _grow_on(dataclasses.replace(leaf_plan, path=""), sharding)  # Leaves of one shape share a program.
    new = program(leaf, leaf_key(leaf_plan, seed), step)
    if donate and isinstance(leaf, jax.Array):
      jax.block_until_ready(new)
      leaf.delete()
    return new

  trees = (tree,) if out_shardings is None else (tree, out_shardings)
  return jax.tree_util.tree_map_with_path(grow, *trees)


@functools.cache
def _grow_on(plan: LeafPlan, sharding: Any) -> Callable[..., jax.Array]:
  def grow(leaf: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
    # The copy keeps an unchanged leaf from sharing its buffer with the old state, which may be donated or deleted.
    return jnp.copy(leaf) if plan.new_rows is NewRows.NONE else grow_leaf(leaf, plan, key, step)

  return jax.jit(grow, out_shardings=sharding)


def leaf_key(plan: LeafPlan, seed: int) -> jax.Array:
  """The key of a leaf's new rows."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(plan.path.encode()))
  return jax.random.fold_in(key, plan.old_shape[plan.axis] if plan.axis is not None else 0)


def grow_leaf(
  leaf: jax.Array, plan: LeafPlan, key: jax.Array, step: jax.Array, first_layer: jax.Array | int = 0
) -> jax.Array:
  """`leaf` as planned, its new rows after the old ones.

  Args:
    leaf: the whole leaf, or of a stacked one the layers from `first_layer` on; either gives the same rows.
    plan: its plan, whose path is used by `leaf_key` alone.
    key: see `leaf_key`.
    step: int32 [], updates done so far: the birth of new rows.
  """
  match plan.new_rows:
    case NewRows.NONE:
      return leaf
    case NewRows.NEW_TAU:
      return jnp.full_like(leaf, plan.number)
    case NewRows.SCALED_TAU:
      return leaf * jnp.asarray(plan.number, leaf.dtype)
    case NewRows.REPEATED | NewRows.PARTS | NewRows.SQUARED_PARTS:
      return jnp.concatenate(_copies(leaf, plan), axis=plan.axis)
  assert plan.axis is not None
  shape = list(leaf.shape)
  shape[plan.axis] = plan.new_shape[plan.axis] - plan.old_shape[plan.axis]
  match plan.new_rows:
    case NewRows.RANDOM:
      # The barrier keeps the multiplication separate, so that all programs give the same bits.
      rows = jax.lax.optimization_barrier(_random_rows(tuple(shape), key, first_layer)) * plan.number
    case NewRows.LIVE:
      rows = _live_rows(leaf, shape[plan.axis], key, first_layer)
    case _:
      rows = jnp.full(shape, step if plan.new_rows is NewRows.STEP else 0)
  return jnp.concatenate([leaf, rows.astype(leaf.dtype)], axis=plan.axis)


def _copies(leaf: jax.Array, plan: LeafPlan) -> list[jax.Array]:
  """The k copies of all rows; where rows are cut in parts, the i-th copy (from 1) has i / (1 + … + k) of each."""
  assert plan.axis is not None
  k = plan.new_shape[plan.axis] // plan.old_shape[plan.axis]
  if plan.new_rows is NewRows.REPEATED:
    return [leaf] * k
  shares = [2 * i / (k * (k + 1)) for i in range(1, k + 1)]
  if plan.new_rows is NewRows.SQUARED_PARTS:
    return [leaf * jnp.asarray(share**2, leaf.dtype) for share in shares]
  parts = [leaf * jnp.asarray(share, leaf.dtype) for share in shares[:-1]]
  return [*parts, leaf - sum(parts)]  # Together they are the old row, as nearly as its dtype can express it.


def _layer_keys(key: jax.Array, first_layer: jax.Array | int, stacked: tuple[int, ...]) -> jax.Array:
  """A key for each layer of a stack of shape [layer, …]; each expert of a layer has its own."""
  first = first_layer * math.prod(stacked[1:])
  return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(math.prod(stacked)))


def _random_rows(shape: tuple[int, ...], key: jax.Array, first_layer: jax.Array | int) -> jax.Array:
  """N(0, 1) of a shape [..., new, channel]; the rows of a layer depend on no other layer."""
  keys = _layer_keys(key, first_layer, shape[:-2])
  rows = jax.vmap(lambda key: jax.random.normal(key, shape[-2:], jnp.float32))(keys)
  return rows.reshape(shape)


def _live_rows(keys: jax.Array, num_new: int, key: jax.Array, first_layer: jax.Array | int) -> jax.Array:
  """√(m/n) · O R for each layer of keys [..., n, d], with m new rows."""
  n, d = keys.shape[-2:]
  layers = keys.astype(sum_dtype(keys.dtype)).reshape(-1, n, d)

  def of_layer(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    keys_NxD, key = inputs
    if num_new >= min(n, d):
      root_RxD = jnp.linalg.qr(keys_NxD, mode="r")
    else:  # The keys' rank is at most `num_new` (`check_rank`), so that the further directions are zero.
      _, sizes_R, directions_RxD = jnp.linalg.svd(keys_NxD, full_matrices=False)
      root_RxD = (sizes_R[:, None] * directions_RxD)[:num_new]
    random_MxR = jax.random.normal(key, (num_new, len(root_RxD)), keys_NxD.dtype)
    columns_MxR, _ = jnp.linalg.qr(random_MxR)
    product = jnp.matmul(columns_MxR, root_RxD, precision=jax.lax.Precision.HIGHEST)
    return math.sqrt(num_new / n) * jax.lax.optimization_barrier(product)

  # One layer after the other, so that a slice of the layers gets the same rows as all of them at once.
  rows = jax.lax.map(of_layer, (layers, _layer_keys(key, first_layer, keys.shape[:-2])))
  return rows.reshape(*keys.shape[:-2], num_new, d)


def check_rank(tree: Any, plan: Mapping[str, LeafPlan]) -> None:
  """Raises ValueError where `live` growth adds fewer keys than the old ones have independent directions.

  Args:
    tree: the state or model of the plan, with arrays as leaves.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf_plan = plan[path_name(path)]
    if leaf_plan.new_rows is NewRows.LIVE:
      check_leaf_rank(leaf, leaf_plan)


def check_leaf_rank(leaf: Any, plan: LeafPlan) -> None:
  """`check_rank` for one leaf of keys [..., n, d], or some layers of it."""
  assert plan.axis is not None
  n, d = leaf.shape[-2:]
  num_new = plan.new_shape[plan.axis] - plan.old_shape[plan.axis]
  if num_new >= min(n, d):
    return
  rank = int(jnp.max(jnp.linalg.matrix_rank(jnp.asarray(leaf, sum_dtype(leaf.dtype)))))
  if num_new < rank:
    raise ValueError(
      f"{plan.path}: {n} -> {n + num_new} tokens: method='live' needs as many new keys as the old ones have "
      f"independent directions, {rank}; choose at least {n + rank} tokens, or method='exact'."
    )
