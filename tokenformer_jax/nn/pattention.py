"""The pattention layer: parameter tokens in the place of a linear layer's matrix."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenformer_jax.config import KERNELS
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.distributed.axes import is_split, platform
from tokenformer_jax.nn.parameters import Rows, Tau, parameter
from tokenformer_jax.nn.remat import OUTPUT
from tokenformer_jax.nn.theta import check_choices, initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

_RECORDED: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorded inputs of rows", default=None)


@contextlib.contextmanager
def recorded_inputs() -> Iterator[list[tuple[nnx.Module, Array]]]:
  """A context in which every call of a `Pattention`, an `MLP` or `Experts` appends (layer, x) to the list that the context gives.

  Under a JAX transformation the inputs are tracers of that transformation: use them before it ends.
  """
  recorded: list[tuple[nnx.Module, Array]] = []
  token = _RECORDED.set(recorded)
  try:
    yield recorded
  finally:
    _RECORDED.reset(token)


def record(layer: nnx.Module, x: Array) -> None:
  """Appends a layer and its input to the list of `recorded_inputs`, if there is one."""
  if (recorded := _RECORDED.get()) is not None:
    recorded.append((layer, x))


class Pattention(nnx.Module):
  """`[..., d_in] -> [..., d_out]` through `num_tokens` parameter tokens; a drop-in for `nnx.Linear`.

  Args:
    d_in: channels of the input.
    d_out: channels of the output.
    num_tokens: the number of parameter tokens N; the layer has N · (d_in + d_out) parameters.
    theta: `l2_norm_gelu` (default), `gelu_l2_norm` or `softmax`.
    gelu: `erf` or `tanh`.
    key_std: standard deviation of new keys, here and in growth. It cancels in Θ's norm and sets only how fast keys
      learn.
    value_std: standard deviation of new values, here and in growth. The default 1/√N keeps the size of normalised
      inputs.
    count: the name under which growth changes the number of tokens: `tf.grow(model, num_tokens=48)`. Layers with one
      name grow together.
    kernel: `reference` (also `auto`), or `fused`, on TPUs and for sizes that are multiples of 128.
    dtype: the dtype of the computation, to which inputs and parameters are cast, and of the output; by default the
      dtype of the inputs. Θ and sums are computed in float32 or wider.
    param_dtype: the dtype in which keys and values are stored; τ is always float32.
    rngs: parameters are drawn from `rngs.params()`.

  Raises:
    ValueError: a size below 1, an unknown choice, or a dtype that is not floating point.
  """

  keys: nnx.Param
  values: nnx.Param
  tau: Tau
  # The scales of int8 tokens (`inference.int8`).
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
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
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
    self.dtype = None if dtype is None else _floating("dtype", dtype)
    param_dtype = _floating("param_dtype", param_dtype)
    for name, role, channels, std in (("keys", "key", d_in, key_std), ("values", "value", d_out, value_std)):
      rows = Rows(count, role, std)
      init = _stored_as(param_dtype, nnx.initializers.normal(rows.std_of(num_tokens)))
      setattr(self, name, parameter(rngs, (num_tokens, channels), ("param_token", "embed"), init, rows))
    self.tau = Tau(jnp.float32(initial_tau(theta, num_tokens)), axes=(), theta=theta)

  def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
    """Θ(x Kᵀ) V, [..., d_in] -> [..., d_out]. There may be no rows, which gives an output without rows."""
    if self.dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):  # `pattention` refuses other inputs.
      x = x.astype(self.dtype)
    scales = [scale if scale is None else scale[...] for scale in (self.key_scales, self.value_scales)]
    tokens = ParameterTokens(self.keys[...], self.values[...], self.tau[...], *scales)
    record(self, x)
    y = self._fused(x, tokens) if self.kernel == "fused" else self._reference(x, tokens)
    return checkpoint_name(y, OUTPUT)

  def _fused(self, x: Array, tokens: ParameterTokens) -> Array:
    # Imported only here, because importing Pallas takes longer than importing the rest of this package.
    from tokenformer_jax.kernels.fused_pattention import fused_pattention

    if platform() != "tpu":
      raise ValueError(f"kernel='fused': it is for TPUs, and this is {platform()}; choose kernel='reference'.")
    return fused_pattention(x, tokens, self.theta, self.gelu)

  def _reference(self, x: Array, tokens: ParameterTokens) -> Array:
    def apply(x: Array) -> Array:
      return pattention(x, tokens, self.theta, self.gelu)

    # Flattened rows [B·T] cannot be split along both B and T, so where T is split each row of the batch is computed
    # on its own.
    return jax.vmap(apply)(x) if x.ndim > 2 and is_split("time") else apply(x)


def require_float_tokens(model: nnx.Module, action: str) -> None:
  """Refuses a model whose parameter tokens are a form for inference only, before they are changed or stored.

  Args:
    model: any NNX model.
    action: what is about to happen to it, as a past participle for the message: `grown`, `exported`.

  Raises:
    ValueError: the model has int8 parameter tokens (`inference.int8`), or it is a copy for decoding
      (`models.decoding_model`).
  """
  for _, module in nnx.iter_modules(model):
    if getattr(module, "only_decodes", False):
      raise ValueError(
        f"a {type(module).__name__} only decodes and cannot be {action}; take the LanguageModel whose for_decoding() "
        "made it."
      )
    if isinstance(module, Pattention) and module.key_scales is not None:
      raise ValueError(
        f"the model's parameter tokens are int8 already and cannot be {action}; take the model with float tokens "
        "that it was made from."
      )


def _floating(name: str, dtype: DTypeLike) -> jnp.dtype:
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name}={dtype}: must be a floating-point dtype, such as float32 or bfloat16.")
  return dtype


def _stored_as(dtype: jnp.dtype, init: nnx.Initializer) -> nnx.Initializer:
  """`init`, whose draws are cast: a narrower parameter is then the rounded float32 one of the same seed."""
  return lambda *args: init(*args).astype(dtype)
