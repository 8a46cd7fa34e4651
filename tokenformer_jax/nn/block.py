"""One TokenFormer layer (arXiv 2410.23168, eq. 6–8)."""

import math

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.attention import Attention
from tokenformer_jax.nn.layer_norm import layer_norm
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.remat import keep_scores

# Standard deviation of new keys, as released.
KEY_STD = 0.02


class Block(nnx.Module):
  """x + Attention(LN(x)), then + Pattention(LN(·)); the norms have no parameters."""

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

  def __call__(self, x_BxTxD, by, segments=None, remat=keep_scores):
    """[B, T, d] -> [B, T, d].

    Args:
      by, segments: see `Attention`.
      remat: wraps each norm and what is made of it. Who looks at what happens inside gives the identity.
    """
    q, k, v = remat(lambda x: self.attention.project(layer_norm(x), by))(x_BxTxD)
    return self._with(x_BxTxD, self.attention.attend(q, k, v, segments), remat)

  def prefill(self, x_BxTxD, by, segments, cache, layer):
    """`__call__` for the first tokens of an empty `cache`; returns (output, cache)."""
    attended, cache = self.attention.prefill(layer_norm(x_BxTxD), by, segments, cache, layer)
    return self._with(x_BxTxD, attended), cache

  def extend(self, x_BxTxD, by, mask, cache, layer):
    """`__call__` for tokens that follow those in `cache`; returns (output, cache)."""
    attended, cache = self.attention.extend(layer_norm(x_BxTxD), by, mask, cache, layer)
    return self._with(x_BxTxD, attended), cache

  def _with(self, x_BxTxD, attended_BxTxD, remat=keep_scores):
    x_BxTxD += attended_BxTxD
    return x_BxTxD + remat(lambda x: self.ffn(layer_norm(x)))(x_BxTxD)


def value_std(config: ModelConfig) -> float:
  """Standard deviation of new values, 2 / (L √d): GPT-NeoX's `wang_init`, as released."""
  return 2.0 / (config.num_layers * math.sqrt(config.hidden_size))
