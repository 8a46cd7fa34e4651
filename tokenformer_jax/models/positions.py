"""Where the tokens of a model stand: positions that are added to their embedding, or rotary tables for attention."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.rotary import Rotation, rotation


class WithPositions:
  """The positions of every model's tokens, as `config.attention.positions` says.

  Attributes:
    config: sizes and choices of the model.
    position_embedding: [seq_length, d], where positions are learned.
    position_scale: [], the factor of scaled sinusoidal positions.
  """

  config: ModelConfig
  position_embedding: nnx.Param | None = None
  position_scale: nnx.Param | None = None

  def make_positions(self, rngs: nnx.Rngs) -> None:
    """Makes the parameters that the positions need, drawn from `rngs.params()`."""
    shape = (self.config.seq_length, self.config.hidden_size)
    if self.config.attention.positions == "learned":
      self.position_embedding = parameter(rngs, shape, (None, "embed"), nnx.initializers.normal(STD))
    if self.config.attention.positions == "scaled_sinusoidal":
      self.position_scale = parameter(rngs, (), (), nnx.initializers.constant(shape[1] ** -0.5), decayed=False)

  def placed(
    self, x: Float[Array, "batch time embed"], positions: Int[Array, "#batch time"]
  ) -> Float[Array, "batch time embed"]:
    """The embedded tokens with what the positions add to them, in x's dtype."""
    if self.position_embedding is not None:
      return x + constrain(self.position_embedding[...], None, None)[positions].astype(x.dtype)
    if self.config.attention.positions == "rotary":
      return x
    waves = sinusoidal(positions, x.shape[-1])
    return x + (waves if self.position_scale is None else self.position_scale[...] * waves).astype(x.dtype)

  def rotation(self, positions: Int[Array, "#batch time"]) -> Rotation | None:
    """The rotary tables of these positions; None for a model that embeds its positions."""
    if self.config.attention.positions != "rotary":
      return None
    return rotation(positions, self.config.rotary_dims, self.config.rotary_base)


def sinusoidal(positions: Int[Array, "batch time"], channels: int) -> Float[Array, "batch time embed"]:
  """sin and cos, in turn along the channels, of position · 10,000^(−2i / channels), float32 (arXiv 1706.03762)."""
  frequencies = 10_000.0 ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
  return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :channels]
