"""Exact growth: new keys zero, new values random, τ kept (arXiv 2410.23168, section 3.3 and appendix B).

A zero key scores 0 for every input, so its weight is GeLU(0) = 0, and it adds nothing to the norm:
the function stays as it was. Its gradient does not vanish, because its value is not zero.
"""

import dataclasses
import zlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.plan import LeafPlan, NewRows, path_name, plan_growth
from tokenformer_jax.growth.report import GrowthReport
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.block import value_std
from tokenformer_jax.nn.parameters import split


def grow_state(state: Any, config: ModelConfig, new_config: ModelConfig, *, seed: int = 0, out_shardings=None
               ) -> tuple[Any, ModelConfig, GrowthReport]:
  """A training state with the parameter tokens of `new_config` and the function of `config`.

  Moments of old rows are kept to the bit and those of new rows begin at 0; the step count goes on.
  The random values are drawn from (seed, leaf, layer, old count) alone.

  Args:
    state: a dataclass pytree with `params`, and what else a training state has (`training.state`).
    out_shardings: where the new leaves go, a tree like `state`; by default where JAX puts them.

  Returns:
    (state, new_config, report).

  Raises:
    ValueError: see `plan_growth`.
  """
  plan = plan_growth(state, config, new_config)
  step = getattr(state, "step", jnp.int32(0))
  std = value_std(config)

  def grow(state, step):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: grow_leaf(leaf, plan[path_name(path)], seed, std, step), state)

  return jax.jit(grow, out_shardings=out_shardings)(state, step), new_config, GrowthReport(tuple(plan.values()))


def grow_leaf(leaf: jax.Array, plan: LeafPlan, seed: int, std: float, step: jax.Array,
              first_layer: jax.Array | int = 0) -> jax.Array:
  """`leaf` with its new rows appended after the old ones.

  Args:
    leaf: the whole leaf, or, of a stacked one, the layers from `first_layer` on; either gives the same rows.
  """
  if plan.axis is None:
    return leaf
  shape = list(leaf.shape)
  shape[plan.axis] = plan.new_shape[plan.axis] - plan.old_shape[plan.axis]
  if plan.new_rows is NewRows.RANDOM:
    rows = _random_rows(plan, tuple(shape), seed, first_layer) * std
  else:
    rows = jnp.full(shape, step if plan.new_rows is NewRows.STEP else 0)
  return jnp.concatenate([leaf, rows.astype(leaf.dtype)], axis=plan.axis)


def _random_rows(plan: LeafPlan, shape: tuple[int, ...], seed: int, first_layer: jax.Array | int) -> jax.Array:
  """N(0, 1) for a stacked leaf [layer, new, channel], a layer's rows depending on no other layer."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(plan.path.encode()))
  key = jax.random.fold_in(key, plan.old_shape[plan.axis])
  layer_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_layer + jnp.arange(shape[0]))
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(layer_keys)


@dataclasses.dataclass(frozen=True)
class _Weights:
  params: Any
  tau: Any


jax.tree_util.register_dataclass(_Weights, ["params", "tau"], [])


def grow(model: LanguageModel, *, qkv_tokens: int | None = None, proj_tokens: int | None = None,
         ffn_tokens: int | None = None, seed: int = 0) -> tuple[LanguageModel, GrowthReport]:
  """A bigger model with the same function: `bigger, report = grow(model, ffn_tokens=4096)`.

  Counts not given stay. Raises ValueError for fewer tokens than the model has.
  """
  given = dict(qkv_tokens=qkv_tokens, proj_tokens=proj_tokens, ffn_tokens=ffn_tokens)
  new_config = model.config.grown(**{name: count for name, count in given.items() if count is not None})
  _, params, tau = split(model)
  weights, _, report = grow_state(_Weights(params, tau), model.config, new_config, seed=seed)
  graphdef, _, _ = split(nnx.eval_shape(lambda: LanguageModel(new_config, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, weights.params, weights.tau), report
