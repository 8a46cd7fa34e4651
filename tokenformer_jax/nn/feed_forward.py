"""The feed-forward of a dense Transformer, whose hidden units are rows as parameter tokens are.

    mlp     y = f(x Kᵀ + a) V + b
    gated   y = (f(x Gᵀ) · x Kᵀ) V

With an element-wise f in the place of Θ, K and V are the keys and values of pattention. The rows lie on the same axis and
have the same count, so growth, shrinking and sharding serve both.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.kernels.products import by_rows, row_products, weighted_sums, with_fast_gradient
from tokenformer_jax.nn.initializers import STD, output_std
from tokenformer_jax.nn.parameters import Rows, parameter
from tokenformer_jax.nn.pattention import Pattention, record
from tokenformer_jax.nn.projection import token_projection
from tokenformer_jax.nn.remat import OUTPUT, SCORES

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


class MLP(nnx.Module):
  """[..., d_in] -> [..., d_out] through `num_rows` hidden units, in x's dtype; f is computed in float32 or wider.

  Args:
    d_in, d_out: channels of input and output.
    num_rows: the number of hidden units.
    activation: the name of f.
    gated: whether the hidden units are gated.
    bias: whether there are biases, 0 at first; a gated one has a bias for each of its products.
    key_std, value_std: standard deviations of new rows.
    count: the name under which growth changes the number of rows.
    rngs: parameters are drawn from `rngs.params()`.
  """

  def __init__(
    self,
    d_in: int,
    d_out: int,
    num_rows: int,
    *,
    activation: str = "gelu",
    gated: bool = False,
    bias: bool = False,
    key_std: float = STD,
    value_std: float = STD,
    count: str = "ffn_tokens",
    rngs: nnx.Rngs,
  ):
    self.activation = activation

    def rows(channels: int, role: str, std: float) -> nnx.Param:
      declared = Rows(count, role, std, elementwise=True)
      return parameter(rngs, (num_rows, channels), ("param_token", "embed"), nnx.initializers.normal(std), declared)

    def row_biases() -> nnx.Param:
      zeros = nnx.initializers.zeros
      return parameter(
        rngs, (num_rows,), ("param_token",), zeros, Rows(count, "key", 0.0, elementwise=True), decayed=False
      )

    self.keys = rows(d_in, "key", key_std)
    self.values = rows(d_out, "value", value_std)
    self.gates = rows(d_in, "key", key_std) if gated else None
    self.key_biases = row_biases() if bias else None
    self.gate_biases = row_biases() if bias and gated else None
    self.bias = parameter(rngs, (d_out,), (None,), nnx.initializers.zeros, decayed=False) if bias else None

  def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
    record(self, x)

    def feed_forward(x_MxD: Array) -> Array:
      h_MxN = self.hidden_units(x_MxD).astype(x.dtype)
      y_MxE = weighted_sums(h_MxN, with_fast_gradient(self.values[...].astype(x.dtype), x_MxD))
      return (y_MxE if self.bias is None else y_MxE + self.bias[...].astype(y_MxE.dtype)[None]).astype(x.dtype)

    return checkpoint_name(by_rows(feed_forward, x), OUTPUT)

  def hidden_units(self, x: Float[Array, "m d_in"]) -> Float[Array, "m param_token"]:
    """The weights of the values for each row of x, in float32 or wider."""
    h_MxN = self._scores(x, self.keys, self.key_biases)
    activation = ACTIVATIONS[self.activation]
    if self.gates is None:
      return activation(h_MxN)
    return activation(self._scores(x, self.gates, self.gate_biases)) * h_MxN

  def _scores(self, x_MxD: Array, keys: nnx.Param, biases: nnx.Param | None) -> Array:
    s_MxN = row_products(x_MxD, with_fast_gradient(keys[...].astype(x_MxD.dtype), x_MxD))
    s_MxN = checkpoint_name(s_MxN.astype(x_MxD.dtype), SCORES).astype(s_MxN.dtype)
    return s_MxN if biases is None else s_MxN + biases[...].astype(s_MxN.dtype)[None]


def make_feed_forward(config: ModelConfig, *, rngs: nnx.Rngs) -> Pattention | MLP:
  """The feed-forward that `config.ffn` describes; parameters are drawn from `rngs.params()`."""
  size = config.hidden_size
  if config.ffn.kind == "pattention":
    return token_projection(config, size, size, "ffn_tokens", rngs=rngs)
  return MLP(
    size,
    size,
    config.ffn_tokens,
    activation=config.ffn.activation,
    gated=config.ffn.kind == "gated",
    bias=config.ffn.bias,
    value_std=output_std(config),
    rngs=rngs,
  )
