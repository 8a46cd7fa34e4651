"""TokenFormer's own mixture of experts: parameter tokens in groups, of which a router lets each input token attend to some.

    h = x Rᵀ + log a  (float32),    C the `chosen` groups of the highest h,    p = softmax(h)
    y = Σ over g in C of (1 + p_g − stop(p_g)) Θ_C(x Kᵀ)_g V_g

Group g is the rows [g n, (g + 1) n) of an ordinary pattention. Θ_C is Θ over the rows of the chosen groups alone: its norm,
or for softmax its sum, runs over them, and its scale is τ · τ(k n) / τ(G n), with τ(N) that of a new layer with N tokens.
So τ means what it means without a router, and the weights keep their size whatever k of the G groups are chosen. The gate
is 1 and carries the router's gradient. With k = G the layer is therefore pattention itself, whatever the router says.

The prior a is 1 for a group that was there from the start. Growth adds groups with a = 0, which nothing chooses: the
function stays, for every Θ. In training a rises with the age of the group (`training.new_rows`), so that new groups do not
displace old ones at once.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import is_split, per_device, splits
from tokenformer_jax.kernels.grouped import grouped_row_products, grouped_weighted_sums, make_groups
from tokenformer_jax.kernels.products import sum_dtype, weighted_sums, with_fast_gradient
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.initializers import STD, value_std
from tokenformer_jax.nn.parameters import Rows, Tau, parameter
from tokenformer_jax.nn.pattention import record
from tokenformer_jax.nn.remat import OUTPUT, SCORES
from tokenformer_jax.nn.router import router_said, router_scores
from tokenformer_jax.nn.theta import GELUS, THETAS, initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, token_weights


class TokenGroups(nnx.Module):
  """[B, T, d] -> [B, T, d] through the groups of parameter tokens that a router chooses for each input token.

  `keys`, `values` and `tau` are those of a `Pattention` of `config.ffn_tokens` tokens, under the same names.

  Args:
    config: sizes and choices of the model; `config.ffn` describes this part.
    rngs: parameters are drawn from `rngs.params()`.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    part, size, count = config.ffn, config.hidden_size, config.ffn_tokens
    self.part, self.theta, self.gelu = part, config.theta, config.gelu
    active, normal = part.chosen * part.group_tokens / count, nnx.initializers.normal

    def tokens(role: str, std: float) -> nnx.Param:
      rows = Rows("ffn_tokens", role, std)
      return parameter(rngs, (count, size), ("param_token", "embed"), normal(std), rows, active=active)

    def of_groups(role: str) -> Rows:
      return Rows("ffn_tokens", role, STD, tokens=part.group_tokens)

    self.keys = tokens("key", STD)
    self.values = tokens("value", value_std(config))
    self.tau = Tau(jnp.float32(initial_tau(config.theta, count)), axes=(), theta=config.theta)
    num_groups, ones = count // part.group_tokens, nnx.initializers.ones
    self.router = parameter(rngs, (num_groups, size), ("token_group", "router"), normal(STD), of_groups("router"))
    self.prior = parameter(rngs, (num_groups,), ("token_group",), ones, of_groups("prior"), decayed=False)

  def __call__(
    self, x: Float[Array, "batch time embed"], context: Context
  ) -> tuple[Float[Array, "batch time embed"], dict[str, Array]]:
    """(output, the losses and statistics of the router, as means over the real tokens).

    No token is dropped, and the output of a token depends on no other token.

    Raises:
      ValueError: devices split the tokens in the middle of a group.
    """
    record(self, x)
    scores = self.scores(x)
    chance, chosen = jax.nn.softmax(scores, axis=-1), self.choose(scores)
    gates = 1.0 + (chance - jax.lax.stop_gradient(chance))  # In another order it would not be exactly 1.
    said = router_said(self.part, scores, chosen, scores.shape[-1], context.real)
    if self.part.chosen == scores.shape[-1]:
      y = self._through_all(x, gates)
    else:
      y = self._through_chosen(x, chosen, jnp.take_along_axis(gates, chosen, axis=-1))
    return checkpoint_name(y, OUTPUT), said

  def scores(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time group"]:
    """h, in float32 or wider; −∞ for a group with the prior 0."""
    h, prior = router_scores(x, self.router[...]), jax.lax.stop_gradient(self.prior[...])
    return h + jnp.log(jnp.maximum(prior, 0.0)).astype(h.dtype)[None, None]

  def choose(self, scores: Float[Array, "batch time group"]) -> Int[Array, "batch time choice"]:
    """The groups that each token attends to, by falling score."""
    return jax.lax.top_k(scores, self.part.chosen)[1]

  def _through_all(self, x, gates):
    """Plain pattention, with the gates on its weights."""
    tokens = ParameterTokens(self.keys[...], self.values[...], self.tau[...])

    def attend(x, gates):
      weights_MxN = token_weights(x, tokens, self.theta, self.gelu)
      weights_MxN *= jnp.repeat(gates.reshape(len(weights_MxN), -1), self.part.group_tokens, axis=1)
      table = with_fast_gradient(tokens.values.astype(x.dtype), x)
      return weighted_sums(weights_MxN.astype(x.dtype), table).astype(x.dtype).reshape(x.shape)

    return jax.vmap(attend)(x, gates) if is_split("time") else attend(x, gates)

  def _through_chosen(self, x, chosen, gates):
    """Products of the chosen groups alone. Devices that split the groups each add up their own, for all of their tokens."""
    rows = (splits("batch", x.shape[0]) or None, splits("time", x.shape[1]) or None)
    count, size = len(self.keys[...]), self.part.group_tokens
    over = splits("param_token", count)
    tables = [table[...].astype(x.dtype) for table in (self.keys, self.values)]
    factor = initial_tau(self.theta, self.part.chosen * size) / initial_tau(self.theta, count)

    def local(x, chosen, gates, keys, values, tau):
      if len(keys) % size:
        raise ValueError(
          f"mesh.token={count // len(keys)}: each device would hold {len(keys)} of ffn_tokens={count}, which are no whole "
          f"groups of ffn.group_tokens={size}; choose a mesh.token that divides the {count // size} groups."
        )
      num_local = len(keys) // size
      if over:
        chosen = chosen - jax.lax.axis_index(over) * num_local
        chosen = jnp.where((chosen >= 0) & (chosen < num_local), chosen, num_local)
      keys, values = (table.reshape(num_local, size, -1) for table in (keys, values))
      y = self._local(x.reshape(-1, x.shape[-1]), chosen.reshape(-1), gates, keys, values, tau * factor, over)
      return y.reshape(1, *x.shape)

    by_row, by_token = PartitionSpec(*rows, None), PartitionSpec(over or None, None)
    specs = (by_row, by_row, by_row, by_token, by_token, PartitionSpec())
    # The sum over devices stands outside, where the gradient of each device's part needs no communication.
    parts = per_device(local, specs, PartitionSpec(over or None, *rows, None))
    return jnp.sum(parts(x, chosen, gates, *tables, self.tau[...]), axis=0).astype(x.dtype)

  def _local(self, x_MxD, chosen_R, gates, keys, values, tau, over):
    chosen, size = self.part.chosen, self.part.group_tokens
    groups = make_groups(chosen_R, len(keys))
    rows_PxD = groups.sort(jnp.repeat(x_MxD, chosen, axis=0))
    # Θ is over all chosen rows of a token, so that they stand beside one another: those of other devices as zeros.
    scores = groups.unsort(grouped_row_products(rows_PxD, keys, groups)).reshape(len(x_MxD), chosen * size)
    if self.theta == "l2_norm_gelu":
      scores = scores.astype(x_MxD.dtype)  # As in `parameter_tokens.token_weights`.
    scores = checkpoint_name(scores, SCORES).astype(sum_dtype(scores.dtype))
    tau = tau.astype(scores.dtype)
    if not over:
      weights = THETAS[self.theta](scores, tau, GELUS[self.gelu])
    elif self.theta != "softmax":  # A score of zero has no weight and adds nothing to a norm.
      weights = THETAS[self.theta](scores, tau, GELUS[self.gelu], over)
    else:
      here = jnp.repeat((chosen_R < len(keys)).reshape(len(x_MxD), chosen), size, axis=1)
      weights = _split_softmax(jnp.where(here, scores, -jnp.inf), tau, over)
    rows_PxN = groups.sort(weights.reshape(-1, size).astype(x_MxD.dtype))
    y_MxKxD = groups.unsort(grouped_weighted_sums(rows_PxN, values, groups)).reshape(len(x_MxD), chosen, -1)
    return jnp.sum(y_MxKxD * gates.reshape(len(x_MxD), chosen, 1).astype(y_MxKxD.dtype), axis=1)


def _split_softmax(scores, tau, over):
  """τ · softmax of rows that devices hold parts of."""
  top = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(scores), axis=-1, keepdims=True), over)
  exps = jnp.exp(scores - top)
  return tau * exps / jax.lax.psum(jnp.sum(exps, axis=-1, keepdims=True), over)
