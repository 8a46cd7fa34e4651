"""The pattention layer: parameter tokens in the place of a linear layer's matrix."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from tokenformer_jax.config import KERNELS
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.distributed.axes import is_split, platform
from tokenformer_jax.nn.parameters import Rows, Tau, parameter
from tokenformer_jax.nn.remat import OUTPUT
from tokenformer_jax.nn.theta import check_choices, initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

_RECORDED: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorded pattention inputs", default=None)


@contextlib.contextmanager
def recorded_inputs():
  """Within it, every call of a `Pattention` appends (layer, x) to the list that is given.

  Under a JAX transformation the inputs are tracers of that transformation: use them before it ends.
  """
  recorded: list[tuple[Pattention, Array]] = []
  token = _RECORDED.set(recorded)
  try:
    yield recorded
  finally:
    _RECORDED.reset(token)


class Pattention(nnx.Module):
  """`[..., d_in] -> [..., d_out]` through `num_tokens` parameter tokens; a drop-in for `nnx.Linear`.

  Args:
    d_in, d_out: channels in and out.
    num_tokens: parameter tokens N; the layer has N · (d_in + d_out) parameters.
    theta: `l2_norm_gelu` (default), `gelu_l2_norm` or `softmax`.
    gelu: `erf` or `tanh`.
    key_std: standard deviation of new keys, here and in growth. It cancels in Θ's norm and sets only how fast keys learn.
    value_std: standard deviation of new values, here and in growth. By default 1/√N, which keeps the size of normalised
      inputs.
    count: the name under which growth changes the number of tokens: `tf.grow(model, num_tokens=48)`. Layers with one
      name grow together.
    kernel: `reference` (also `auto`), or `fused`, on TPUs and for sizes that are multiples of 128.
    rngs: parameters are drawn from `rngs.params()`.
  """

  # Of int8 tokens (`inference.int8`).
  key_scales: nnx.Param | None = None
  value_scales: nnx.Param | None = None

  def __init__(
    self,
    d_in: int,
    d_out: int,
    num_tokens: int,
    *,
    theta: str = "l2_norm_gelu",
    gelu: str = "erf",
    key_std: float = 0.02,
    value_std: float | None = None,
    count: str = "num_tokens",
    kernel: str = "auto",
    rngs: nnx.Rngs,
  ):
    check_choices(theta, gelu)
    require_choice("kernel", kernel, KERNELS)
    for name, size in (("d_in", d_in), ("d_out", d_out), ("num_tokens", num_tokens)):
      if size < 1:
        raise ValueError(f"{name}={size}: must be at least 1.")
    self.theta = theta
    self.gelu = gelu
    self.kernel = kernel
    for name, role, channels, std in (("keys", "key", d_in, key_std), ("values", "value", d_out, value_std)):
      rows = Rows(count, role, std)
      init = nnx.initializers.normal(rows.std_of(num_tokens))
      setattr(self, name, parameter(rngs, (num_tokens, channels), ("param_token", "embed"), init, rows))
    self.tau = Tau(jnp.float32(initial_tau(theta, num_tokens)), axes=(), theta=theta)

  def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
    scales = [scale if scale is None else scale[...] for scale in (self.key_scales, self.value_scales)]
    tokens = ParameterTokens(self.keys[...], self.values[...], self.tau[...], *scales)
    if (recorded := _RECORDED.get()) is not None:
      recorded.append((self, x))
    y = self._fused(x, tokens) if self.kernel == "fused" else self._reference(x, tokens)
    return checkpoint_name(y, OUTPUT)

  def _fused(self, x, tokens):
    # Here, for Pallas takes longer to import than the rest of us.
    from tokenformer_jax.kernels.fused_pattention import fused_pattention

    if platform() != "tpu":
      raise ValueError(f"kernel='fused': it is for TPUs, and this is {platform()}; choose kernel='reference'.")
    return fused_pattention(x, tokens, self.theta, self.gelu)

  def _reference(self, x, tokens):
    def apply(x):
      return pattention(x, tokens, self.theta, self.gelu)

    # Rows [B·T] cannot be split along both B and T: where T is, each row of the batch goes for itself.
    return jax.vmap(apply)(x) if x.ndim > 2 and is_split("time") else apply(x)
