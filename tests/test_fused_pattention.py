"""The fused kernel, run as plain JAX, gives the numbers of the reference."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import small_run
from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding, replicated, traced_on
from tokenformer_jax.distributed.chips import CHIPS
from tokenformer_jax.distributed.topologies import can_compile, kept_out_of_the_cache, slice_mesh
from tokenformer_jax.kernels import fused_pattention as fused_module
from tokenformer_jax.kernels import gelu, pattention_kernels
from tokenformer_jax.kernels.fused_pattention import fused_pattention
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention
from tokenformer_jax.training.program import make_program

N, D, E = 384, 128, 256


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  # With these sizes the inputs have several blocks of rows and of tokens, and several chunks.
  monkeypatch.setattr(pattention_kernels, "_ROWS", 16)
  monkeypatch.setattr(pattention_kernels, "_TOKENS", 128)
  monkeypatch.setattr(fused_module, "_CHUNK", 32)


def arguments(dtype=jnp.float32, shape=(2, 25), far=()):
  """x, tokens, d_y. Some rows of x have scores that are all zero, negative or huge; `far` has further (row, size)."""
  rng = np.random.default_rng(0)
  x, d_y = rng.normal(size=(*shape, D)), rng.normal(size=(*shape, E))
  keys, values = rng.normal(size=(N, D)), rng.normal(size=(N, E))
  keys[:, 0] = -np.abs(keys[:, 0]) - 1.0
  x[0, 0] = 0.0
  for row, size in ((1, 3.0), (3, 1e6), (4, -4.0), *far):
    x[0, row] = size * (np.arange(D) == 0) + 1e-2 * size * x[0, row]
  tokens = ParameterTokens(*(jnp.asarray(a, jnp.float32) for a in (keys, values, 7.0)))
  return jnp.asarray(x, dtype), tokens, jnp.asarray(d_y, dtype)


def value_and_gradients(function, theta, gelu, x, tokens, d_y, **given):
  y, pull = jax.vjp(lambda x, tokens: function(x, tokens, theta, gelu, **given), x, tokens)
  d_x, d_tokens = pull(d_y)
  return dict(y=y, d_x=d_x, d_keys=d_tokens.keys, d_values=d_tokens.values, d_tau=d_tokens.tau)


def assert_equal_by_row(ours, reference, relative):
  """Each row of y and d_x against its own largest number, the others against the largest of all."""
  for name in ours:
    a, b = (np.asarray(each[name], np.float64) for each in (ours, reference))
    assert a.shape == b.shape and np.all(np.isfinite(a)), name
    size = np.abs(b).max(axis=-1 if name in ("y", "d_x") else None, keepdims=True)
    assert np.all(np.abs(a - b) <= relative * size), (name, np.max(np.abs(a - b) / np.maximum(size, 1e-30)))


@pytest.mark.parametrize("theta, gelu", [("l2_norm_gelu", "erf"), ("gelu_l2_norm", "erf"), ("gelu_l2_norm", "tanh")])
def test_the_numbers_equal_the_reference(theta, gelu):
  given = arguments()
  ours = value_and_gradients(fused_pattention, theta, gelu, *given, interpret=True)
  assert_equal_by_row(ours, value_and_gradients(pattention, theta, gelu, *given), 1e-5)
  assert not np.any(ours["y"][0, 0]) and not np.any(ours["d_x"][0, 0])


def test_rows_in_the_tail_of_gelu():
  given = arguments(far=[(2, 12.0)])  # Exponents of several hundred amplify the rounding of the scores.
  ours = value_and_gradients(fused_pattention, "gelu_l2_norm", "erf", *given, interpret=True)
  assert_equal_by_row(ours, value_and_gradients(pattention, "gelu_l2_norm", "erf", *given), 1e-4)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm"])
def test_bfloat16_is_as_close_to_float32_as_the_reference(theta):
  x, tokens, d_y = arguments(jnp.bfloat16)
  x, d_y = x[1:], d_y[1:]
  exact = value_and_gradients(pattention, theta, "erf", x.astype(jnp.float32), tokens, d_y.astype(jnp.float32))
  for name, ours in value_and_gradients(fused_pattention, theta, "erf", x, tokens, d_y, interpret=True).items():
    reference = value_and_gradients(pattention, theta, "erf", x, tokens, d_y)[name]
    assert ours.dtype == reference.dtype
    error, allowed = (np.linalg.norm(np.asarray(a, np.float64) - exact[name]) for a in (ours, reference))
    # τ's gradient is one number, and the reference's may be right by chance.
    slack = 2.0**-7 if name == "d_tau" else 1e-6
    assert error <= 1.2 * allowed + slack * np.linalg.norm(exact[name]), (name, error, allowed)


@pytest.mark.parametrize(
  "theta, sizes",
  [
    ("l2_norm_gelu", dict(data=2, fsdp=2)),
    ("l2_norm_gelu", dict(data=2, sequence=2)),
    ("l2_norm_gelu", dict(data=2, token=3)),
    ("gelu_l2_norm", dict(token=3)),
  ],
  ids=str,
)
def test_devices_share_rows_and_tokens(theta, sizes):
  mesh = small_run.mesh(**sizes)
  x, tokens, d_y = arguments(shape=(4, 6))

  def ours(*given):
    return value_and_gradients(fused_pattention, theta, "erf", *given, interpret=True)

  given = jax.device_put((x, tokens, d_y), replicated(mesh))
  assert_equal_by_row(
    jax.jit(traced_on(mesh, ours))(*given), value_and_gradients(pattention, theta, "erf", x, tokens, d_y), 1e-5
  )


def test_unsupported_arguments_are_refused():
  x, tokens, _ = arguments()
  with pytest.raises(
    ValueError, match="kernel='fused': theta='softmax' has no fused kernel; choose kernel='reference'"
  ):
    fused_pattention(x, tokens, "softmax")
  fewer = ParameterTokens(tokens.keys[:200], tokens.values[:200], tokens.tau)
  with pytest.raises(ValueError, match="kernel='fused': param_token=200 is not a multiple of 128; choose kernel='ref"):
    fused_pattention(x, fewer)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_give_no_rows(shape):
  x, tokens, d_y = jnp.ones((*shape, D)), arguments()[1], jnp.ones((*shape, E))
  ours = value_and_gradients(fused_pattention, "l2_norm_gelu", "erf", x, tokens, d_y, interpret=True)
  assert (ours["y"].shape, ours["d_x"].shape) == ((*shape, E), (*shape, D))
  assert not np.any(ours["d_keys"]) and not np.any(ours["d_values"]) and not np.any(ours["d_tau"])


def test_erfc_keeps_its_precision():
  x = np.linspace(-5.0, 9.0, 3001, dtype=np.float32)
  np.testing.assert_allclose(gelu._erfc(jnp.asarray(x)), jax.lax.erfc(jnp.asarray(x)), rtol=3e-6)


def test_it_is_refused_on_other_devices_than_tpus():
  layer = Pattention(D, E, N, kernel="fused", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="kernel='fused': it is for TPUs, and this is cpu; choose kernel='reference'"):
    layer(jnp.ones((2, D)))


@pytest.mark.skipif(bool(can_compile(CHIPS["v5e"])), reason=can_compile(CHIPS["v5e"]))
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
@pytest.mark.parametrize(
  "mesh, kernels",
  [
    (dict(data=4), {"splash_mha", "pattention_gelu_l2_norm", "pattention_gelu_l2_norm_gradient"}),
    (dict(data=2, token=2), {"splash_mha"}),
  ],
  ids=["rows", "tokens"],
)
def test_a_train_step_compiles_for_tpus_with_its_kernels(mesh, kernels):
  model = ModelConfig(
    vocab_size=512,
    num_layers=2,
    hidden_size=128,
    num_heads=2,
    qkv_tokens=128,
    proj_tokens=128,
    ffn_tokens=256,
    seq_length=128,
    compute_dtype="bfloat16",
    theta="gelu_l2_norm",
    kernel="fused",
  )
  mesh = slice_mesh(MeshConfig(**mesh), "v5e:2x2")
  program = make_program(Config(model=model, data=DataConfig(batch_size=4)), model, mesh)
  ids = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=batch_sharding(mesh, (4, 128)))
  with kept_out_of_the_cache():
    text = program.train_step.lower(program.shapes, data.Batch(ids, ids)).compile().as_text()
  found = set(re.findall(r"(splash_mha|pattention_\w+)", text))
  assert "tpu_custom_call" in text and found & {"splash_mha", *kernels} == kernels, found
  assert ("pattention_gelu_l2_norm" in found) == ("pattention_gelu_l2_norm" in kernels)
