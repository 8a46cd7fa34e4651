"""A mixture of experts as a block's feed-forward: a router sends each token through `chosen` of `experts` networks.

    h = x Rᵀ (float32),   p = softmax(h),   y = Σ over the chosen e of w_e Expert_e(x)

w is p, or p divided by its sum over the chosen ones (`renormalise`). Switch Transformer (arXiv 2101.03961) has one chosen
expert and a capacity, Mixtral (arXiv 2401.04088) two and none. Further entries of the router may be no-ops, whose output
is 0 (integrated mixture of depths and experts, arXiv 2404.02258).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.kernels.grouped import Groups, grouped_row_products, grouped_weighted_sums, make_groups
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.feed_forward import ACTIVATIONS
from tokenformer_jax.nn.initializers import STD, output_std, value_std
from tokenformer_jax.nn.parameters import Rows, Tau, parameter
from tokenformer_jax.nn.pattention import record
from tokenformer_jax.nn.remat import OUTPUT, SCORES
from tokenformer_jax.nn.router import router_said, router_scores
from tokenformer_jax.nn.theta import GELUS, THETAS, initial_tau


class Experts(nnx.Module):
  """[B, T, d] -> [B, T, d] through the experts that a router chooses for each token.

  Each expert has `config.ffn_tokens` rows: hidden units, or parameter tokens, whose τ all experts share. The router is
  float32 whatever the dtype of the products, and it decays as other matrices do.

  Args:
    config: sizes and choices of the model; `config.ffn` describes this part.
    rngs: parameters are drawn from `rngs.params()`.
  """

  gates: nnx.Param | None = None
  tau: Tau | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    part, size = config.ffn, config.hidden_size
    self.part, self.theta, self.gelu = part, config.theta, config.gelu
    has_tokens = part.kind == "pattention"

    def rows(role: str, std: float) -> nnx.Param:
      declared = Rows("ffn_tokens", role, std, elementwise=not has_tokens)
      shape, axes = (part.experts, config.ffn_tokens, size), ("expert", "param_token", "embed")
      return parameter(rngs, shape, axes, nnx.initializers.normal(std), declared, active=part.active)

    self.router = parameter(rngs, (part.experts + part.no_ops, size), (None, "router"), nnx.initializers.normal(STD))
    self.keys = rows("key", STD)
    self.values = rows("value", value_std(config) if has_tokens else output_std(config))
    if part.kind == "gated":
      self.gates = rows("key", STD)
    if has_tokens:
      tau = jnp.float32(initial_tau(config.theta, config.ffn_tokens))
      self.tau = Tau(tau, axes=(), theta=config.theta)

  def __call__(
    self, x: Float[Array, "batch time embed"], context: Context
  ) -> tuple[Float[Array, "batch time embed"], dict[str, Array]]:
    """(output, the losses and statistics of the router, as means over the real tokens).

    In training an expert takes no more tokens than its capacity. Otherwise every token reaches the experts that it
    chooses, so that the output of a token depends on no other token.
    """
    record(self, x)
    part = self.part
    scores = self.scores(x)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), part.chosen)
    if part.renormalise:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    kept = chosen < part.experts
    wanted = kept
    if context.training and part.capacity:
      kept = within_capacity(chosen, part.experts + part.no_ops, self.capacity(x.shape[1]), context.real) & kept
    said = self._said(scores, chosen, wanted, kept, context.real)
    y = self._through_experts(x, jnp.where(kept, chosen, part.experts), jnp.where(kept, weights, 0.0))
    return checkpoint_name(y, OUTPUT), said

  def scores(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time entry"]:
    """The router's logits, in float32 or wider."""
    return router_scores(x, self.router[...])

  def capacity(self, time: int) -> int:
    """The most tokens of a sequence that an expert takes in training."""
    return max(1, math.ceil(self.part.capacity * self.part.active * time))

  def _through_experts(self, x, chosen, weights):
    """Σ weights · Expert(x). Devices that split the experts each add up their own, for all of their tokens."""
    rows = (splits("batch", x.shape[0]) or None, splits("time", x.shape[1]) or None)
    over = splits("expert", self.part.experts)
    names = [name for name in ("keys", "values", "gates") if getattr(self, name) is not None]
    tables = {name: getattr(self, name)[...].astype(x.dtype) for name in names}
    tau = None if self.tau is None else self.tau[...]

    def local(x, chosen, weights, tables, tau):
      num_local = len(tables["keys"])
      if over:
        chosen = chosen - jax.lax.axis_index(over) * num_local
        chosen = jnp.where((chosen >= 0) & (chosen < num_local), chosen, num_local)
      y = self._local(x.reshape(-1, x.shape[-1]), chosen.reshape(-1), weights, tables, tau)
      return y.reshape(1, *x.shape)

    by_row, by_expert = PartitionSpec(*rows, None), PartitionSpec(over or None, None, None)
    specs = (by_row,) * 3, dict.fromkeys(names, by_expert), None if tau is None else PartitionSpec()
    # The sum over devices stands outside, where the gradient of each device's part needs no communication.
    parts = per_device(local, (*specs[0], *specs[1:]), PartitionSpec(over or None, *rows, None))
    return jnp.sum(parts(x, chosen, weights, tables, tau), axis=0).astype(x.dtype)

  def _local(self, x_MxD, chosen_R, weights, tables, tau):
    groups = make_groups(chosen_R, len(tables["keys"]))
    rows_PxD = groups.sort(jnp.repeat(x_MxD, self.part.chosen, axis=0))
    product = functools.partial(_scores, rows_PxD, groups)
    scores = product(tables["keys"])
    if tau is not None:
      h_PxN = THETAS[self.theta](scores, tau.astype(scores.dtype), GELUS[self.gelu])
    elif self.gates is not None:
      h_PxN = ACTIVATIONS[self.part.activation](product(tables["gates"])) * scores
    else:
      h_PxN = ACTIVATIONS[self.part.activation](scores)
    y_PxD = grouped_weighted_sums(h_PxN.astype(x_MxD.dtype), tables["values"], groups)
    y_MxKxD = groups.unsort(y_PxD).reshape(len(x_MxD), self.part.chosen, -1)
    return jnp.sum(y_MxKxD * weights.reshape(len(x_MxD), self.part.chosen, 1).astype(y_MxKxD.dtype), axis=1)

  def _said(self, scores, chosen, wanted, kept, real) -> dict[str, Array]:
    """The losses and statistics of the router; the no-op entries are free of the balance's pull."""
    said = router_said(self.part, scores, chosen, self.part.experts, real)
    real = jnp.ones(scores.shape[:2], scores.dtype) if real is None else real.astype(scores.dtype)
    choices = jnp.maximum(jnp.sum(wanted * real[:, :, None]), 1.0)
    said["router/dropped"] = 1.0 - jnp.sum(kept * real[:, :, None]) / choices
    if self.part.no_ops:
      said["router/no_op"] = jnp.sum(~wanted * real[:, :, None]) / (jnp.maximum(jnp.sum(real), 1.0) * self.part.chosen)
    return said


def _scores(rows_PxD, groups: Groups, table):
  s_PxN = grouped_row_products(rows_PxD, table, groups)
  # The backward pass keeps the scores in the dtype of the rows, as it does those of a single feed-forward.
  return checkpoint_name(s_PxN.astype(rows_PxD.dtype), SCORES).astype(s_PxN.dtype)


def within_capacity(
  chosen: Int[Array, "batch time choice"], num_entries: int, capacity: int, real: Bool[Array, "batch time"] | None
) -> Bool[Array, "batch time choice"]:
  """Which choices find room, if each entry takes `capacity` tokens of each sequence.

  Earlier tokens come first, with all of their choices, so that no token depends on a later one. (In GShard, arXiv
  2006.16668, all first choices come before all second ones, which tells a token what later ones chose.) Padding takes no
  room and finds none.

  Args:
    chosen: the entries that each token chose.
    num_entries: the number of entries.
    capacity: the tokens that each takes.
    real: which tokens are not padding.
  """
  taken = jax.nn.one_hot(chosen, num_entries, dtype=jnp.int32)
  if real is not None:
    taken = taken * real[:, :, None, None]
  queue = jnp.cumsum(taken.reshape(len(chosen), -1, num_entries), axis=1).reshape(taken.shape)
  return jnp.sum(taken * (queue <= capacity), axis=-1) > 0
