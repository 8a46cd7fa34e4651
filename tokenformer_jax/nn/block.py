"""One block: attention between tokens, a feed-forward, and how they are added up.

    sequential   U = a X + b Attention(N X),        Y = c U + d FeedForward(N' U)
    post-norm    U = N(a X + b Attention(X)),       Y = N'(c U + d FeedForward(U))
    parallel     Y = c X + b Attention(N X) + d FeedForward(N' X)

TokenFormer (arXiv 2410.23168, eq. 6–8) is the sequential block with a = b = c = d = 1, norms without parameters, and
parameter tokens in the place of every matrix.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.attention import Attention
from tokenformer_jax.nn.cache import LayerCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.experts import Experts
from tokenformer_jax.nn.feed_forward import MLP, make_feed_forward
from tokenformer_jax.nn.gain import Gain, total
from tokenformer_jax.nn.norm import Norm
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.token_groups import TokenGroups

# What a block says beside its output: scalars by name, such as the statistics of a router.
Said = dict[str, jax.Array]


class Block(nnx.Module):
  """[B, T, d] -> [B, T, d], by the parts that the configuration describes.

  Args:
    config: sizes and choices of the model.
    is_first: whether this is the model's first block, which may have parameters that the others lack.
    rngs: parameters are drawn from `rngs.params()`.
  """

  ffn: Pattention | MLP | Experts | TokenGroups

  def __init__(self, config: ModelConfig, *, is_first: bool = False, rngs: nnx.Rngs):
    part, size = config.residual, config.hidden_size
    self.parallel = part.parallel
    self.attention = Attention(config, is_first=is_first, rngs=rngs)
    if config.ffn.has_router:
      self.ffn = TokenGroups(config, rngs=rngs) if config.ffn.group_tokens else Experts(config, rngs=rngs)
    else:
      self.ffn = make_feed_forward(config, rngs=rngs)

    first_kind = "layer_norm" if config.norm == "none" and is_first else config.norm
    norm = Norm(first_kind, size, config.norm_epsilon, rngs=rngs)
    ffn_norm = None if part.norms == "shared" else Norm(config.norm, size, config.norm_epsilon, rngs=rngs)
    self.norms = part.norms
    self.norm, self.ffn_norm = norm, ffn_norm

    self.attention_skip = Gain(0.0 if part.parallel else part.attention_skip, part.trained, rngs=rngs)
    self.attention_gain = Gain(part.attention_gain, part.trained, rngs=rngs)
    self.ffn_skip = Gain(part.ffn_skip, part.trained, rngs=rngs)
    self.ffn_gain = Gain(part.ffn_gain, part.trained, rngs=rngs)

  def __call__(
    self, x: Float[Array, "batch time embed"], context: Context, cache: LayerCache | None = None
  ) -> tuple[Float[Array, "batch time embed"], LayerCache | None, Said]:
    """(output [B, T, d], the cache with these tokens in it, what the block says).

    Args:
      x: the residual stream.
      context: where the tokens stand, and which of them see each other.
      cache: the layer's cache in decoding; None otherwise.
    """
    q, k, v = context.remat(lambda x: self.attention.project(self._before(self.norm)(x), context))(x)
    attended, cache = self.attention.mix(q, k, v, context, cache)
    if self.parallel:
      fed, said = self._feed_forward(x, context)
      return total(self.ffn_skip(x), self.attention_gain(attended), self.ffn_gain(fed)), cache, said
    u = self._after(self.norm)(total(self.attention_skip(x), self.attention_gain(attended)))
    fed, said = self._feed_forward(u, context)
    return self._after(self.ffn_norm)(total(self.ffn_skip(u), self.ffn_gain(fed))), cache, said

  def _feed_forward(self, x: jax.Array, context: Context) -> tuple[jax.Array, Said]:
    norm = self._before(self.norm if self.ffn_norm is None else self.ffn_norm)
    if isinstance(self.ffn, (Experts, TokenGroups)):
      routed = self.ffn
      return context.remat(lambda x: routed(norm(x), context))(x)
    plain = self.ffn
    return context.remat(lambda x: plain(norm(x)))(x), {}

  def _before(self, norm: Norm) -> Callable[[jax.Array], jax.Array]:
    return _identity if self.norms == "post" else norm

  def _after(self, norm: Norm | None) -> Callable[[jax.Array], jax.Array]:
    return norm if self.norms == "post" and norm is not None else _identity


def _identity(x):
  return x
