"""What a block reads beside the residual stream: where its tokens stand, and which of them may see each other."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.remat import keep_scores
from tokenformer_jax.nn.rotary import Rotation


@dataclasses.dataclass(frozen=True)
class Context:
  """The tokens of one forward pass. Training and prefill attend among the tokens themselves, decoding to a cache.

  Attributes:
    positions: the position of each token in its document, [B, T] or [1, T].
    rotation: rotary tables of these positions; None for a model that adds its positions to the embedding.
    segments: document of each token; attention stays inside a document. None is one document.
    real: which tokens are not padding; None is all of them.
    causal: whether a token sees only itself and those before it; an encoder's tokens also see those behind them, but no
      padding.
    visible: which slots of the cache each token may see, [B, 1, T, S]; None where tokens attend among themselves.
    filled: the number of slots that the cache had filled before these tokens, or that of each row; None without a
      cache.
    seen: how many tokens each token sees with a cache, itself included; None is position + 1.
    training: whether this is the forward pass of an update, in which experts drop tokens beyond their capacity and
      routed blocks choose among all tokens of a sequence.
    remat: wraps each norm with the projections that read it. The identity disables rematerialisation, so that values
      from inside can be observed, as growth's measure of usage does.
  """

  positions: Int[Array, "batch time"]
  rotation: Rotation | None = None
  segments: Int[Array, "batch time"] | None = None
  real: Bool[Array, "batch time"] | None = None
  causal: bool = True
  visible: Bool[Array, "batch 1 time slot"] | None = None
  filled: Int[Array, "*rows"] | None = None
  seen: Int[Array, "batch time"] | None = None
  training: bool = False
  remat: Callable[[Callable], Callable] = keep_scores

  def split(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
    """x as the devices of a mesh split it before the projections: by rows and positions, and fsdp's parameters travel.

    The tokens of a decode step are fewer than the parameters. They are split by channels along fsdp, as the parameters
    are, which then stay where they are.
    """
    if self.visible is None:
      return constrain(x, "batch", "time", None)
    return constrain(x, "step", None, "embed")

  def observed(self) -> "Context":
    """The same context without rematerialisation."""
    return dataclasses.replace(self, remat=lambda function: function)

  def of(self, chosen: Int[Array, "batch k"], valid: Bool[Array, "batch k"] | None) -> "Context":
    """The context of some of the tokens, which keep their positions and documents and see one another only.

    Args:
      chosen: their indices in each row, in the order in which they are to stand.
      valid: which of them count; the others are padding, seen by none that counts. None is all of them.
    """

    def take(a: Array) -> Array:
      a = jnp.broadcast_to(a, (len(chosen), *a.shape[1:]))
      return jnp.take_along_axis(a, chosen.reshape(*chosen.shape, *[1] * (a.ndim - 2)), axis=1)

    segments = None if self.segments is None else take(self.segments)
    if valid is not None:
      segments = jnp.where(valid, 0 if segments is None else segments, -1)
    rotation = None if self.rotation is None else (take(self.rotation[0]), take(self.rotation[1]))
    return dataclasses.replace(self, positions=take(self.positions), rotation=rotation, segments=segments, real=valid)

  def key_segments(self) -> Int[Array, "batch time"] | None:
    """The document of each token as one that others may see: padding belongs to none, which no token has as its own."""
    if self.real is None:
      return self.segments
    return jnp.where(self.real, 0 if self.segments is None else self.segments, -1)
