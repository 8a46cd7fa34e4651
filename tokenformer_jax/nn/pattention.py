"""The pattention layer: parameter tokens in the place of a linear layer's matrix."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from tokenformer_jax.config import KERNELS
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.distributed.axes import is_split, platform
from tokenformer_jax.nn.parameters import Tau, parameter
from tokenformer_jax.nn.remat import OUTPUT
from tokenformer_jax.nn.theta import check_choices, initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention


class Pattention(nnx.Module):
  """`[..., d_in] -> [..., d_out]` through `num_tokens` parameter tokens; a drop-in for `nnx.Linear`.

  Args:
    d_in, d_out: channels in and out.
    num_tokens: parameter tokens N; the layer has N · (d_in + d_out) parameters.
    theta: `l2_norm_gelu` (default), `gelu_l2_norm` or `softmax`.
    gelu: `erf` or `tanh`.
    key_init: keys' initialiser. The default's scale cancels in Θ's norm: it sets only the pace of learning.
    value_init: values' initialiser; by default N(0, 1/N), which keeps the size of normalised inputs.
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
    key_init: nnx.Initializer = nnx.initializers.normal(0.02),
    value_init: nnx.Initializer | None = None,
    kernel: str = "auto",
    rngs: nnx.Rngs,
  ):
    check_choices(theta, gelu)
    require_choice("kernel", kernel, KERNELS)
    for name, size in (("d_in", d_in), ("d_out", d_out), ("num_tokens", num_tokens)):
      if size < 1:
        raise ValueError(f"{name}={size}: must be at least 1.")
    value_init = value_init or nnx.initializers.normal(1.0 / math.sqrt(num_tokens))
    self.theta = theta
    self.gelu = gelu
    self.kernel = kernel
    self.keys = parameter(rngs, (num_tokens, d_in), ("param_token", "embed"), key_init)
    self.values = parameter(rngs, (num_tokens, d_out), ("param_token", "embed"), value_init)
    self.tau = Tau(jnp.float32(initial_tau(theta, num_tokens)), axes=())

  def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
    scales = [scale if scale is None else scale[...] for scale in (self.key_scales, self.value_scales)]
    tokens = ParameterTokens(self.keys[...], self.values[...], self.tau[...], *scales)
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
