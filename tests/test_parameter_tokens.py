"""Θ and pattention equal the float64 oracle over the whole range of float32 scores."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import oracle
from tokenformer_jax.kernels.products import row_products
from tokenformer_jax.nn.theta import GELUS, THETAS, initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

pytestmark = pytest.mark.usefixtures("strict_dtypes")

L2_VARIANTS = [(theta, gelu) for theta in ("l2_norm_gelu", "gelu_l2_norm") for gelu in ("erf", "tanh")]
every_theta = pytest.mark.parametrize("theta, gelu", [*L2_VARIANTS, ("softmax", "erf")])
every_theta_and_dtype = pytest.mark.parametrize(
  "theta, gelu, dtype",
  [
    *((*choice, jnp.float32) for choice in [*L2_VARIANTS, ("softmax", "erf")]),
    *((theta, "erf", jnp.bfloat16) for theta in ("l2_norm_gelu", "gelu_l2_norm", "softmax")),
  ],
)
l2_variants = pytest.mark.parametrize("theta, gelu", L2_VARIANTS)

N = 12
apply = jax.jit(pattention, static_argnums=(2, 3))


def random_layer(n=N, d_in=8, d_out=6, theta="l2_norm_gelu"):
  """(x [5, d_in], tokens)."""
  rng = np.random.default_rng(0)
  x, keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, d_in), (n, d_in), (n, d_out)))
  return x, ParameterTokens(keys, values, initial_tau(theta, n))


def layer_of(scores, theta, gelu, dtype):
  """(x [1], tokens) such that the scores are this row, and the output is the weights of the row."""
  n = len(scores)
  return jnp.ones(1, dtype), ParameterTokens(scores[:, None], jnp.eye(n), jnp.float32(initial_tau(theta, n)))


@functools.partial(jax.jit, static_argnames=("theta", "gelu", "dtype"))
def weights_of(scores, theta, gelu, dtype=jnp.float32):
  """Θ of each row of scores, computed by `pattention`."""
  return jax.vmap(lambda row: pattention(*layer_of(row, theta, gelu, dtype), theta, gelu))(scores)


def score_rows():
  """Maps a name to a row of scores: ordinary, huge, near zero, far below zero, of mixed sizes."""
  row = np.random.default_rng(1).normal(size=N)
  unit = row / np.linalg.norm(row)
  rows = {"ordinary": row, "hundreds": 100 * row, "ties": np.round(row)}
  rows |= {"mixed": row * 10.0 ** np.arange(-6, 6)}
  rows |= {f"times {size:.0e}": size * row for size in (1e4, 1e10, 1e18)}
  rows |= {f"norm {norm:.2e}": norm * unit for norm in (1.01e-12, 1e-11, 1e-6, 1e-3)}
  rows |= {f"below {-low}": -low + unit / low for low in (2, 4, 6, 7, 9, 10, 12, 15, 20, 40, 100)}
  rows |= {"one positive": np.where(np.arange(N) == 3, 0.5, -50.0)}
  return {name: row.astype(np.float32) for name, row in rows.items()}


def slope_scale(scores, theta):
  """The rate at which the largest weight follows its score; slopes are rounded relative to τ times this."""
  return 1.0 if theta == "softmax" else 1.0 / np.max(np.abs(scores)) + max(-np.max(scores), 0.0)


@every_theta
def test_weights_and_slopes_equal_the_formula(theta, gelu):
  names, rows = zip(*score_rows().items())
  scores, tau = np.stack(rows), initial_tau(theta, N)
  direction, cotangent = np.random.default_rng(2).uniform(-1, 1, (2, *scores.shape)).astype(np.float32)

  function = functools.partial(weights_of, theta=theta, gelu=gelu)
  weights, slopes = jax.jvp(function, (jnp.asarray(scores),), (jnp.asarray(direction),))
  (pulled,) = jax.vjp(function, jnp.asarray(scores))[1](jnp.asarray(cotangent))

  formula = functools.partial(oracle.weights, theta=theta, tau=tau, kind=gelu)
  expected = formula(scores.astype(np.float64))
  expected_slopes = oracle.slope(formula, scores.astype(np.float64), direction.astype(np.float64))
  pulled_along = np.sum(np.asarray(pulled, np.float64) * direction, axis=-1)
  for i, name in enumerate(names):
    close(weights[i], expected[i], 5e-6 * np.max(np.abs(expected[i])), f"weights, {name}")
    tolerance = 1e-5 * np.max(np.abs(expected_slopes[i])) + 2e-6 * tau * slope_scale(scores[i], theta)
    close(slopes[i], expected_slopes[i], tolerance, f"slopes, {name}")
    close(pulled_along[i], np.dot(cotangent[i], expected_slopes[i]), N * tolerance, f"reverse slopes, {name}")


@pytest.mark.parametrize("gelu", GELUS)
def test_gelus_have_their_documented_precision(gelu):
  x = np.linspace(-8.0, 8.0, 4001, dtype=np.float32)
  exact = x * np.exp(oracle.log_cdf(x.astype(np.float64), gelu))
  rounding = np.finfo(np.float32).eps * np.abs(exact)
  assert np.all(np.abs(GELUS[gelu].value(x) - exact) <= np.maximum(1e-6, 2 * rounding))
  # Far below 0 the exponent's rounding is a relative error of x² roundings.
  assert np.all(np.abs(GELUS[gelu].precise(x) - exact) <= (8 + 2 * x**2) * rounding)


@l2_variants
def test_norms_of_thousands_of_scores(theta, gelu):
  """The sum of the squares of many scores neither overflows nor underflows at the ends of the range."""
  unit = np.random.default_rng(7).normal(size=4096)
  unit /= np.linalg.norm(unit)
  scores = np.stack([1e18 * np.sign(unit), 1.01e-12 * unit]).astype(np.float32)
  expected = oracle.weights(scores.astype(np.float64), theta, math.sqrt(4096), gelu)
  np.testing.assert_allclose(weights_of(scores, theta, gelu), expected, rtol=1e-4, atol=1e-5)


@l2_variants
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_zeros_have_zero_weights_and_gradients(theta, gelu, dtype):
  unit = np.random.default_rng(3).normal(size=N)
  unit /= np.linalg.norm(unit)
  norms = np.array([0.0, 1e-30, 1e-13, 0.98e-12, 1.0])
  scores = jnp.asarray(norms[:, None] * unit, jnp.float32)
  weights, pullback = jax.vjp(lambda s: weights_of(s, theta, gelu, dtype), scores)
  (gradient,) = pullback(jnp.ones_like(weights))
  np.testing.assert_array_equal(weights[:-1], 0)
  np.testing.assert_array_equal(gradient[:-1], 0)
  assert np.any(weights[-1]) and np.any(gradient[-1])


def test_softmax_of_zeros_is_uniform():
  np.testing.assert_allclose(weights_of(jnp.zeros((1, N)), "softmax", "erf"), np.ones((1, N)), rtol=1e-6)


@every_theta_and_dtype
def test_results_are_finite_where_the_scores_are_finite(theta, gelu, dtype):
  signs = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=N)
  rows = [
    size * pattern
    for size in (1e-45, 1e-38, 1e-20, 1.0, 1e4, 1e19, 1e30, 3e38)
    for pattern in (signs, np.abs(signs), -np.abs(signs), -np.ones(N), np.eye(N)[0])
  ]
  rows += [-1e4 + signs, np.where(signs > 0, 3e38, -1e-45), np.zeros(N)]

  @jax.jit
  @jax.vmap
  def value_and_gradients(scores):
    function = functools.partial(pattention, theta=theta, gelu=gelu)
    y, pullback = jax.vjp(function, *layer_of(scores, theta, gelu, dtype))
    return y, pullback(jnp.ones_like(y))

  results = value_and_gradients(jnp.asarray(np.stack(rows), jnp.float32))
  for path, leaf in jax.tree_util.tree_leaves_with_path(results):
    finite = np.isfinite(np.asarray(leaf, np.float32)).reshape(len(rows), -1).all(axis=1)
    assert finite.all(), (jax.tree_util.keystr(path), [rows[i] for i in np.flatnonzero(~finite)])


@every_theta
def test_parameter_tokens_have_no_order(theta, gelu):
  x, tokens = random_layer(theta=theta)
  order = np.random.default_rng(5).permutation(N)
  shuffled = ParameterTokens(tokens.keys[order], tokens.values[order], tokens.tau)
  np.testing.assert_allclose(apply(x, shuffled, theta, gelu), apply(x, tokens, theta, gelu), atol=5e-6)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_scale_of_keys_cancels(factor):
  """This holds only for l2_norm_gelu; a power of two cancels to the last bit."""
  x, tokens = random_layer()
  scaled = ParameterTokens(factor * tokens.keys, tokens.values, tokens.tau)
  np.testing.assert_array_equal(apply(x, scaled), apply(x, tokens))


@l2_variants
def test_scores_may_exceed_the_range_of_float16(theta, gelu):
  x, tokens = random_layer(theta=theta)
  y = apply(256 * x.astype(jnp.float16), dataclasses.replace(tokens, keys=256 * tokens.keys), theta, gelu)
  large = dataclasses.replace(tokens, keys=2.0**16 * tokens.keys)
  np.testing.assert_allclose(y.astype(jnp.float32), apply(x, large, theta, gelu), atol=0.02)


@l2_variants
def test_zero_keys_and_kept_tau_change_nothing(theta, gelu):
  """Exact growth: a zero key scores 0, adds nothing to the norm and weighs GeLU(0) = 0."""
  x, tokens = random_layer(theta=theta)
  grown = ParameterTokens(
    jnp.pad(tokens.keys, ((0, 7), (0, 0))), jnp.concatenate([tokens.values, 100 * jnp.ones((7, 6))]), tokens.tau
  )
  np.testing.assert_allclose(apply(x, grown, theta, gelu), apply(x, tokens, theta, gelu), atol=5e-6)


def test_zero_keys_in_softmax_take_their_share():
  """exp(0) = 1: m zero keys lower every old weight by Z / (Z + m), so softmax does not grow this way."""
  x, tokens = random_layer(theta="softmax")
  seven_more = functools.partial(jnp.pad, pad_width=((0, 7), (0, 0)))
  grown = ParameterTokens(seven_more(tokens.keys), seven_more(tokens.values), tokens.tau)
  z = np.exp(np.asarray(x, np.float64) @ np.asarray(tokens.keys, np.float64).T).sum(axis=-1, keepdims=True)
  expected = apply(x, tokens, "softmax") * z / (z + 7)
  np.testing.assert_allclose(apply(x, grown, "softmax"), expected, rtol=2e-5, atol=1e-6)


@every_theta
def test_copies_that_share_a_value_change_nothing(theta, gelu):
  """Copies of all keys, values divided among the copies, and τ of the new count give the same function for every Θ."""
  x, tokens = random_layer(theta=theta)
  copies = ParameterTokens(
    jnp.tile(tokens.keys, (3, 1)),
    jnp.concatenate([share * tokens.values for share in (0.5, 0.2, 0.3)]),
    initial_tau(theta, 3 * N),
  )
  np.testing.assert_allclose(apply(x, copies, theta, gelu), apply(x, tokens, theta, gelu), atol=2e-5)


@l2_variants
def test_new_rows_learn(theta, gelu):
  """A row with a zero key and a nonzero value gets a gradient for its key and none for its value."""
  x, tokens = random_layer(theta=theta)
  keys, values = tokens.keys.at[-1].set(0.0), tokens.values
  d_keys, d_values = jax.grad(
    lambda k, v: jnp.sum(jnp.square(apply(x, ParameterTokens(k, v, tokens.tau), theta, gelu))), argnums=(0, 1)
  )(keys, values)
  assert np.all(d_keys[-1] != 0)
  np.testing.assert_array_equal(d_values[-1], 0)


def test_scores_of_bfloat16_are_summed_in_float32():
  """257 and 256 are one number in bfloat16; their softmax is (0.73, 0.27) and not (0.5, 0.5)."""
  x = jnp.ones((1, 257), jnp.bfloat16)
  keys = jnp.ones((2, 257)).at[1, 0].set(0.0)
  weights = apply(x, ParameterTokens(keys, jnp.eye(2), 1.0), "softmax")
  np.testing.assert_allclose(weights.astype(jnp.float32)[0], [0.731, 0.269], atol=2e-3)


@every_theta
def test_every_sum_of_bfloat16_is_float32(theta, gelu):
  x, tokens = random_layer(theta=theta)
  function = jax.jit(lambda x, tokens: pattention(x, tokens, theta, gelu))
  program = function.lower(x.astype(jnp.bfloat16), tokens).as_text()
  sums = [line for line in program.splitlines() if "dot_general" in line or "applies stablehlo.add" in line]
  assert len(sums) >= 3
  assert all(line.rstrip().endswith("xf32>") for line in sums), sums


@every_theta_and_dtype
@pytest.mark.parametrize("low", [1.0, 20.0])
def test_pattention_equals_the_oracle(theta, gelu, dtype, low):
  """This holds also where all scores are about −20 with differences of order one."""
  x, tokens = random_layer(theta=theta)
  x = x.at[:, 0].set(1.0)
  tokens = dataclasses.replace(tokens, keys=(tokens.keys / low).at[:, 0].set(-low))
  narrow = [array.astype(dtype) for array in (x, tokens.keys, tokens.values)]
  y = apply(narrow[0], tokens, theta, gelu)
  assert y.dtype == dtype
  expected = oracle.pattention(*(np.asarray(array, np.float64) for array in narrow), theta, kind=gelu)
  tolerance = 5e-6 * low if dtype == jnp.float32 else 0.02
  close(y, expected, tolerance * np.max(np.abs(expected)), "y")


@every_theta
def test_derivatives_against_finite_differences(theta, gelu):
  """In forward and reverse mode, with respect to x, keys, values and τ; for the default Θ also second derivatives."""
  x, tokens = random_layer(theta=theta, n=5, d_in=3, d_out=2)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x[:2], tokens))
    order = 2 if (theta, gelu) == ("l2_norm_gelu", "erf") else 1
    check_grads(lambda x, tokens: apply(x, tokens, theta, gelu), wide, order, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("theta", THETAS)
def test_the_backward_pass_keeps_only_the_scores(theta, dtype):
  """It also keeps numbers for each row; everything else is computed again."""
  x, tokens = random_layer(theta=theta, n=7, d_in=3, d_out=2)
  _, pull = jax.vjp(lambda x, tokens: pattention(x, tokens, theta), x[:5].astype(dtype), tokens)
  kept = jax.tree.leaves(pull)
  assert [leaf.dtype for leaf in kept if leaf.shape == (5, 7)] == [dtype if theta == "l2_norm_gelu" else jnp.float32]
  assert {leaf.shape for leaf in kept} <= {(5, 7), (5, 3), (7, 3), (7, 2), (5,), (5, 1), ()}


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_any_leading_axes(lead):
  _, tokens = random_layer()
  x = np.random.default_rng(6).normal(size=(*lead, 8)).astype(np.float32)
  flat = apply(x.reshape(-1, 8), tokens)
  np.testing.assert_allclose(apply(x, tokens), flat.reshape(*lead, 6), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("theta", THETAS)
def test_no_rows_give_no_rows(theta, shape, dtype):
  x, (_, tokens) = jnp.zeros((*shape, 8), dtype), random_layer(theta=theta)
  y, pull = jax.vjp(lambda x, tokens: pattention(x, tokens, theta), x, tokens)
  d_x, d_tokens = pull(y)
  assert (y.shape, y.dtype, d_x.shape) == ((*shape, 6), dtype, x.shape)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(d_tokens))


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_products_of_few_rows_equal_those_of_many(rows):
  x, table = (np.random.default_rng(rows).normal(size=(n, 24)).astype(np.float32) for n in (rows, 40))
  y, pull = jax.vjp(row_products, x, table)
  d_y = np.random.default_rng(0).normal(size=y.shape).astype(np.float32)
  for ours, expected in zip((y, *pull(d_y)), (x @ table.T, d_y @ table, d_y.T @ x)):
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
  compiled = jax.jit(row_products).lower(x, table).compile().as_text()
  # On a CPU the table is the left side, which XLA reads without changing its layout.
  assert (f"f32[40,{rows}]" in compiled) == (rows <= 64), compiled


@pytest.mark.parametrize("rows, num_tokens, transposed", [(512, 80, True), (510, 80, False), (512, 64, False)])
def test_gradients_of_many_rows_are_transposed_on_a_cpu_and_the_same(rows, num_tokens, transposed):
  _, tokens = random_layer(n=num_tokens, d_in=64, d_out=64)
  x = np.random.default_rng(1).normal(size=(rows, 64)).astype(np.float32)

  def loss(tokens, x=x):
    return jnp.sum(jnp.square(pattention(x, ParameterTokens(*tokens, 3.0))))

  tables = tokens.keys, tokens.values
  compiled = jax.jit(jax.grad(loss)).lower(tables).compile()
  # Both shapes mean that the columns are contiguous.
  products = sum(compiled.as_text().count(f"{shape} dot(") for shape in ("f32[64,80]{1,0}", "f32[80,64]{0,1}"))
  assert products == (2 if transposed else 0), compiled.as_text()
  gradients = compiled(tables)
  # The gradients equal the sum over pairs of rows, and the slope along a line.
  pairs = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(tables, x.reshape(-1, 2, 64))
  for ours, each in zip(gradients, pairs):
    np.testing.assert_allclose(ours, each.sum(axis=0), atol=1e-5 * np.abs(ours).max())
  _, slope = jax.jvp(loss, (tables,), (tables,))
  np.testing.assert_allclose(slope, sum(np.sum(a * b) for a, b in zip(tables, gradients)), rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [7, 12, 32])
def test_a_single_row_equals_the_same_row_in_a_batch(num_tokens):
  """On a CPU its values are summed in blocks, which here have all, 3 and 2 tokens."""
  x, tokens = random_layer(n=num_tokens)
  expected = apply(x, tokens)
  for row in range(3):
    np.testing.assert_allclose(apply(x[row], tokens), expected[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [3, 3.0, np.float64(3.0), jnp.bfloat16(3.0)])
def test_tau_may_be_any_scalar(tau):
  x, tokens = random_layer()
  y = pattention(x, ParameterTokens(tokens.keys, tokens.values, tau))
  np.testing.assert_array_equal(y, pattention(x, ParameterTokens(tokens.keys, tokens.values, jnp.float32(3.0))))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"theta": "l2_norm"}, "theta='l2_norm': choose one of l2_norm_gelu, gelu_l2_norm, softmax"),
    ({"gelu": "exact"}, "gelu='exact': choose one of erf, tanh"),
    ({"x": jnp.ones((2, 7))}, r"x \(2, 7\) and keys \(12, 8\): the last axes must be equal"),
    ({"x": jnp.ones((2, 8), jnp.int32)}, "x of int32: expected floating point"),
    ({"values": jnp.ones((11, 6))}, r"keys \(12, 8\) and values \(11, 6\): expected \[N, d_in\] and "),
  ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_arguments_that_do_not_fit_are_named(change, message):
  x, tokens = random_layer()
  tokens = ParameterTokens(tokens.keys, change.pop("values", tokens.values), tokens.tau)
  with pytest.raises(ValueError, match=message):
    pattention(change.pop("x", x), tokens, **change)


def close(ours, expected, tolerance, name):
  error = np.max(np.abs(np.asarray(ours, np.float64) - expected))
  assert error <= tolerance, f"{name}: error {error}, tolerance {tolerance}"
