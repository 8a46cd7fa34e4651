"""Mixture of depths (arXiv 2404.02258): a router decides which tokens go through a block; the others pass it by.

    r = x · w  (float32),    x_i <- x_i + gate(r_i) (Block(X)_i − x_i)   for the chosen i,   X the chosen tokens alone

The update alone is scaled. The chosen tokens keep their positions, their order and their documents, and attend to one
another only. For a block without skips, Block(X) − X is defined in the same way.

In training each sequence chooses its k = capacity · T highest r (expert choice). That looks into the future, so a rule
that knows only the token itself decides everywhere else, in evaluation, prefill and decoding alike: a small network that
learns to predict the choice, or the sign of r, which an auxiliary loss teaches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import is_split
from tokenformer_jax.kernels.products import sum_dtype
from tokenformer_jax.nn.block import Block, Said
from tokenformer_jax.nn.cache import LayerCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.parameters import parameter


class Predictor(nnx.Module):
  """[B, T, d] -> [B, T], logits of a token's being chosen: a hidden layer of d / 2 ReLUs in float32.

  It does not send gradients into its input.
  """

  def __init__(self, size: int, *, rngs: nnx.Rngs):
    normal, zeros, hidden = nnx.initializers.normal(STD), nnx.initializers.zeros, max(size // 2, 1)
    self.keys = parameter(rngs, (size, hidden), ("router", "router"), normal)
    self.key_biases = parameter(rngs, (hidden,), (None,), zeros, decayed=False)
    self.values = parameter(rngs, (hidden,), ("router",), normal, decayed=False)
    self.bias = parameter(rngs, (), (), zeros, decayed=False)

  def __call__(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time"]:
    wide = sum_dtype(x.dtype)
    keys, key_biases, values = (a[...].astype(wide) for a in (self.keys, self.key_biases, self.values))
    h_BxTxH = jax.nn.relu(jax.lax.stop_gradient(x).astype(wide) @ keys + key_biases[None, None])
    return h_BxTxH @ values + self.bias[...].astype(wide)


class RoutedBlock(nnx.Module):
  """A `Block` that some of the tokens go through, with the same arguments and results.

  Args:
    config: sizes and choices of the model; `config.depth` describes the routing.
    rngs: parameters are drawn from `rngs.params()`.
  """

  predictor: Predictor | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.part = config.depth
    self.block = Block(config, rngs=rngs)
    for _, variable in nnx.to_flat_state(nnx.state(self.block, nnx.Param)):
      variable.set_metadata(active=variable.active * config.depth.capacity)
    size = config.hidden_size
    self.router = parameter(rngs, (size,), ("router",), nnx.initializers.normal(size**-0.5), decayed=False)
    if self.part.choice == "expert" and self.part.causal == "predictor":
      self.predictor = Predictor(size, rngs=rngs)

  def __call__(
    self, x: Float[Array, "batch time embed"], context: Context, cache: LayerCache | None = None
  ) -> tuple[Float[Array, "batch time embed"], LayerCache | None, Said]:
    """(output [B, T, d], the layer's cache, losses and statistics of the routing beside those of the block).

    Raises:
      ValueError: devices split the positions of a sequence, of which each sequence chooses some.
    """
    if is_split("time"):
      raise ValueError(
        f"mesh.sequence > 1 with depth.capacity={self.part.capacity}: a sequence chooses among all of its tokens; "
        "choose mesh.sequence=1."
      )
    r = self.scores(x)
    if context.training:
      chosen, valid = self._top(r, context)
      y, _, said = self._through(x, r, chosen, valid, context, None)
      return y, None, said | self._training_said(x, r, chosen, valid, context)
    routed = self.goes_through(x, r, context)
    # The chosen tokens first, each part in its order. The others are computed beside them and change nothing.
    chosen = jnp.argsort(~routed, axis=1, stable=True)
    valid = jnp.take_along_axis(routed, chosen, axis=1)
    if cache is None or x.shape[1] > 1:
      x, cache, said = self._through(x, r, chosen, valid, context, cache)
      return x, cache, said | {"depth/routed": _mean(routed, context.real)}
    x, cache = jax.lax.cond(
      jnp.any(routed),
      lambda x, cache: self._through(x, r, chosen, valid, context, cache)[:2],
      lambda x, cache: (x, cache),
      x,
      cache,
    )
    return x, cache, {}

  def scores(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time"]:
    """r, in float32 or wider."""
    wide = sum_dtype(x.dtype)
    return x.astype(wide) @ self.router[...].astype(wide)

  def goes_through(
    self, x: Float[Array, "batch time embed"], r: Float[Array, "batch time"], context: Context
  ) -> Bool[Array, "batch time"]:
    """Which tokens go through the block by the rule that knows each token alone."""
    if self.part.choice == "random":
      goes = self._noise(x, context) > jax.scipy.stats.norm.ppf(1.0 - self.part.capacity)
    else:
      goes = self._logits(x, r) > 0
    return goes if context.real is None else goes & context.real

  def num_chosen(self, time: int) -> int:
    """k, for sequences of T tokens."""
    return max(1, round(self.part.capacity * time))

  def _logits(self, x, r):
    return r if self.predictor is None else self.predictor(x)

  def _noise(self, x, context):
    """N(0, 1) for each position, drawn anew whenever the router has changed."""
    bits = jax.lax.bitcast_convert_type(self.router[...][0], jnp.uint32)
    key = jax.random.fold_in(jax.random.key(0), bits)
    positions = jnp.broadcast_to(context.positions, x.shape[:2])
    return jax.vmap(jax.vmap(lambda position: jax.random.normal(jax.random.fold_in(key, position))))(positions)

  def _top(self, r, context) -> tuple[Int[Array, "batch k"], Bool[Array, "batch k"] | None]:
    """The chosen tokens in their order, and which of them count: None for all, else those that count come first."""
    order = self._noise(r[:, :, None], context) if self.part.choice == "random" else r
    may = context.real
    if self.part.choice == "token":
      may = r > 0 if may is None else (r > 0) & may
    if may is not None:
      order = jnp.where(may, order, -jnp.inf)
    top = jax.lax.top_k(jax.lax.stop_gradient(order), self.num_chosen(r.shape[1]))[1]
    if may is None:
      return jnp.sort(top, axis=1), None
    left_out = ~jnp.take_along_axis(may, top, axis=1)
    top = jnp.take_along_axis(top, jnp.argsort(top + left_out * r.shape[1], axis=1), axis=1)
    return top, jnp.take_along_axis(may, top, axis=1)

  def _through(self, x, r, chosen, valid, context, cache):
    x_k = jnp.take_along_axis(x, chosen[:, :, None], axis=1)
    y_k, cache, said = self.block(x_k, *self._inside(chosen, valid, context, cache))
    if cache is not None:
      cache = dataclasses.replace(cache, filled=cache.filled + jnp.sum(valid, axis=1, dtype=cache.filled.dtype))
    gate = jnp.take_along_axis(jax.nn.sigmoid(r) if self.part.gate == "sigmoid" else r, chosen, axis=1)
    if valid is not None:
      gate = jnp.where(valid, gate, 0.0)
    before, after = (a.astype(r.dtype) for a in (x_k, y_k))
    updated = (before + gate[:, :, None] * (after - before)).astype(x.dtype)
    return jax.vmap(lambda x, index, row: x.at[index].set(row, unique_indices=True))(x, chosen, updated), cache, said

  def _inside(self, chosen, valid, context: Context, cache: LayerCache | None) -> tuple[Context, LayerCache | None]:
    """What the block reads beside the chosen tokens."""
    context = context.of(chosen, valid)
    if cache is None:
      return context, None
    assert cache.filled is not None
    seen = cache.filled[:, None] + 1 + jnp.arange(chosen.shape[1])[None]
    visible = (
      None if context.visible is None else jnp.arange(cache.num_slots)[None, None, None] < seen[:, None, :, None]
    )
    return dataclasses.replace(context, visible=visible, filled=cache.filled, seen=seen), cache

  def _training_said(self, x, r, chosen, valid, context) -> Said:
    """The loss that teaches the causal rule, and how often it agrees with the choice, over real tokens."""
    counted = jnp.ones_like(chosen, bool) if valid is None else valid
    target = jax.vmap(lambda index, counts: jnp.zeros(r.shape[1], bool).at[index].set(counts))(chosen, counted)
    said = {"depth/routed": _mean(target, context.real)}
    if self.part.choice == "expert":
      logits = self._logits(x, r)
      losses = optax.sigmoid_binary_cross_entropy(logits, target.astype(logits.dtype))
      said["loss/depth"] = self.part.weight * _mean(losses, context.real)
      said["depth/agreement"] = _mean((logits > 0) == target, context.real)
    if self.part.choice == "token":
      # Switch Transformer's balance of the two ways, each relative to its share: 1 where both have theirs.
      share, chance, capacity = _mean(target, context.real), _mean(jax.nn.sigmoid(r), context.real), self.part.capacity
      balance = share * chance / capacity + (1 - share) * (1 - chance) / (1 - capacity)
      said["loss/depth"] = self.part.weight * balance
    return said


def _mean(a, real):
  """The mean over the real tokens, [B, T] -> []."""
  if real is None:
    return jnp.mean(a.astype(sum_dtype(a.dtype)))
  return jnp.sum(a * real) / jnp.maximum(jnp.sum(real), 1)
