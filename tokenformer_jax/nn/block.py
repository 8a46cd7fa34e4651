"""One TokenFormer layer (arXiv 2410.23168, eq. 6–8)."""

import math
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.attention import Attention
from tokenformer_jax.nn.kv_cache import KVCache
from tokenformer_jax.nn.layer_norm import layer_norm
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.remat import keep_scores
from tokenformer_jax.nn.rotary import Rotation

# Standard deviation of new keys in the released code.
KEY_STD = 0.02


class Block(nnx.Module):
  """y = x + Attention(LN(x)), then y + Pattention(LN(y)); the norms have no parameters.

  Args:
    config: sizes and choices of the model.
    rngs: parameters are drawn from `rngs.params()`.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):

    def projection(count: str) -> Pattention:
      return Pattention(
        config.hidden_size,
        config.hidden_size,
        getattr(config, count),
        theta=config.theta,
        gelu=config.gelu,
        kernel=config.kernel,
        key_std=KEY_STD,
        value_std=value_std(config),
        count=count,
        rngs=rngs,
      )

    self.attention = Attention(config.num_heads, projection)
    self.ffn = projection("ffn_tokens")

  def __call__(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    cos_sin: Rotation,
    segments: Int[Array, "batch time"] | None = None,
    remat: Callable[[Callable], Callable] = keep_scores,
  ) -> Float[Array, "batch time embed"]:
    """[B, T, d] -> [B, T, d].

    Args:
      x_BxTxD: the residual stream.
      cos_sin: the rotary tables of the tokens' positions.
      segments: document of each token; attention stays inside a document. By default one document.
      remat: wraps each norm with the projections that read it. Pass `lambda f: f` to disable rematerialisation, so
        that values from inside can be observed (shrinking records activations in this way).
    """
    q, k, v = remat(lambda x: self.attention.project(layer_norm(x), cos_sin))(x_BxTxD)
    x_BxTxD += self.attention.attend(q, k, v, segments)
    return x_BxTxD + remat(self._feed_forward)(x_BxTxD)

  def prefill(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    cos_sin: Rotation,
    segments: Int[Array, "batch time"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """`__call__` for the first tokens of an empty cache; returns (output, cache)."""
    attended, cache = self.attention.prefill(layer_norm(x_BxTxD), cos_sin, segments, cache, layer)
    x_BxTxD += attended
    return x_BxTxD + self._feed_forward(x_BxTxD), cache

  def extend(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    cos_sin: Rotation,
    mask: Bool[Array, "batch 1 time slot"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """`__call__` for tokens that follow those in the cache; returns (output, cache)."""
    attended, cache = self.attention.extend(layer_norm(x_BxTxD), cos_sin, mask, cache, layer)
    x_BxTxD += attended
    return x_BxTxD + self._feed_forward(x_BxTxD), cache

  def _feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
    return self.ffn(layer_norm(x_BxTxD))


def value_std(config: ModelConfig) -> float:
  """Standard deviation of new values in the released code, 2 / (L √d): GPT-NeoX's `wang_init`."""
  return 2.0 / (config.num_layers * math.sqrt(config.hidden_size))
