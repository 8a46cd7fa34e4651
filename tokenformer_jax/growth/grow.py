"""Growth: the parameter tokens of a bigger model (arXiv 2410.23168, section 3.3 and appendix B).

`exact`: a zero key scores 0 for every input, so its weight is GeLU(0) = 0, and it adds nothing to the
norm: the function stays as it was. Its gradient does not vanish, because its value is not zero.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import GrowthConfig, ModelConfig
from tokenformer_jax.growth.plan import LeafPlan, NewRows, path_name, plan_growth
from tokenformer_jax.growth.report import GrowthReport
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split


def grow_state(
  state: Any,
  config: ModelConfig,
  new_config: ModelConfig,
  growth: GrowthConfig = GrowthConfig(),
  *,
  seed: int = 0,
  out_shardings=None,
) -> tuple[Any, ModelConfig, GrowthReport]:
  """A training state with the parameter tokens of `new_config` and, under `exact`, the function of `config`.

  Moments of old rows are kept to the bit and those of new rows begin at 0; the step count goes on.
  The random values are drawn from (seed, leaf, layer, old count) alone.

  Args:
    state: a dataclass pytree with `params` and `tau`, and what else a training state has (`training.state`).
    growth: how the new rows begin; its stages are not looked at.
    out_shardings: where the new leaves go, a tree like `state`; by default where JAX puts them.

  Returns:
    (state, new_config, report).

  Raises:
    ValueError: see `plan_growth`.
  """
  plan = plan_growth(state, config, new_config, growth)
  step = getattr(state, "step", jnp.int32(0))

  def grow(state, step):
    def grown(path, leaf):
      leaf_plan = plan[path_name(path)]
      return grow_leaf(leaf, leaf_plan, leaf_key(leaf_plan, seed), step)

    return jax.tree_util.tree_map_with_path(grown, state)

  return jax.jit(grow, out_shardings=out_shardings)(state, step), new_config, GrowthReport(tuple(plan.values()))


def leaf_key(plan: LeafPlan, seed: int) -> jax.Array:
  """The key of a leaf's new rows."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(plan.path.encode()))
  return jax.random.fold_in(key, plan.old_shape[plan.axis] if plan.axis is not None else 0)


def grow_leaf(
  leaf: jax.Array, plan: LeafPlan, key: jax.Array, step: jax.Array, first_layer: jax.Array | int = 0
) -> jax.Array:
  """`leaf` as planned: its new rows come after the old ones. `plan.path` is not looked at, but in `leaf_key`.

  Args:
    leaf: the whole leaf, or, of a stacked one, the layers from `first_layer` on; either gives the same rows.
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
  shape = list(leaf.shape)
  shape[plan.axis] = plan.new_shape[plan.axis] - plan.old_shape[plan.axis]
  if plan.new_rows is NewRows.RANDOM:
    # The barrier keeps the product one of its own: the same bits in every program.
    rows = jax.lax.optimization_barrier(_random_rows(tuple(shape), key, first_layer)) * plan.number
  else:
    rows = jnp.full(shape, step if plan.new_rows is NewRows.STEP else 0)
  return jnp.concatenate([leaf, rows.astype(leaf.dtype)], axis=plan.axis)


def _copies(leaf: jax.Array, plan: LeafPlan) -> list[jax.Array]:
  """The k copies of all rows, the i-th (from 1) with i / (1 + … + k) of each where rows are cut in parts."""
  k = plan.new_shape[plan.axis] // plan.old_shape[plan.axis]
  if plan.new_rows is NewRows.REPEATED:
    return [leaf] * k
  shares = [2 * i / (k * (k + 1)) for i in range(1, k + 1)]
  if plan.new_rows is NewRows.SQUARED_PARTS:
    return [leaf * jnp.asarray(share**2, leaf.dtype) for share in shares]
  parts = [leaf * jnp.asarray(share, leaf.dtype) for share in shares[:-1]]
  return [*parts, leaf - sum(parts)]  # Together the old row, as nearly as its type can say.


def _random_rows(shape: tuple[int, ...], key: jax.Array, first_layer: jax.Array | int) -> jax.Array:
  """N(0, 1) for a stacked leaf [layer, new, channel], a layer's rows depending on no other layer."""
  layer_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_layer + jnp.arange(shape[0]))
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(layer_keys)


@dataclasses.dataclass(frozen=True)
class _Weights:
  params: Any
  tau: Any


jax.tree_util.register_dataclass(_Weights, ["params", "tau"], [])


def grow(
  model: LanguageModel,
  *,
  qkv_tokens: int | None = None,
  proj_tokens: int | None = None,
  ffn_tokens: int | None = None,
  method: str = "exact",
  seed: int = 0,
) -> tuple[LanguageModel, GrowthReport]:
  """A bigger model with the same function: `bigger, report = grow(model, ffn_tokens=4096)`.

  Args:
    qkv_tokens, proj_tokens, ffn_tokens: new counts; those not given stay.
    method: `exact`, `duplicate` (whole multiples) or `released`, which changes the function; see `GrowthConfig`.

  Raises:
    ValueError: fewer tokens than the model has, or a way that cannot add them; see `plan.check_growth`.
  """
  given = dict(qkv_tokens=qkv_tokens, proj_tokens=proj_tokens, ffn_tokens=ffn_tokens)
  new_config = model.config.grown(**{name: count for name, count in given.items() if count is not None})
  _, params, tau = split(model)
  weights, _, report = grow_state(
    _Weights(params, tau), model.config, new_config, GrowthConfig(method=method), seed=seed
  )
  graphdef, _, _ = split(nnx.eval_shape(lambda: LanguageModel(new_config, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, weights.params, weights.tau), report
