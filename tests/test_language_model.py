"""The language model: which tokens see which, scan and remat, and the float64 oracle for every choice of its parts."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import oracle
from tests.golden_files import GOLDEN
from tokenformer_jax.config import NAMED_SIZES, REMAT_POLICIES, ModelConfig
from tokenformer_jax.interop.names import released_names, to_released
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.norm import Norm
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.rotary import rotation
from tokenformer_jax.nn.theta import initial_tau

# Square numbers of tokens, so that τ = √N is exact in float32.
CONFIG = ModelConfig(
  vocab_size=40,
  num_layers=3,
  hidden_size=32,
  num_heads=4,
  qkv_tokens=25,
  proj_tokens=16,
  ffn_tokens=49,
  seq_length=16,
  rotary_fraction=0.5,
)


@functools.cache
def lively_parameters():
  """Parameters with values and embedding so large that every part of the model matters."""
  _, parameters, _ = split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
  factors = {"values": 4.0, "embedding": 10.0}
  return jax.tree_util.tree_map_with_path(lambda path, a: a * factors.get(path[-1].key, 1.0), parameters)


def lively_model(parameters=None, **changes):
  """A model of CONFIG with `changes` and these parameters, by default the lively ones."""
  config = dataclasses.replace(CONFIG, **changes)
  graphdef, _, tau = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
  counts = {
    "query": config.qkv_tokens,
    "key": config.qkv_tokens,
    "value": config.qkv_tokens,
    "proj": config.proj_tokens,
    "ffn": config.ffn_tokens,
  }
  tau = jax.tree_util.tree_map_with_path(
    lambda path, a: np.full(a.shape, initial_tau(config.theta, counts[path[-2].key]), np.float32), tau
  )
  return nnx.merge(graphdef, parameters or lively_parameters(), tau)


def random_tokens(shape, seed=0):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def loss_and_logits(parameters, tokens, labels, **changes):
  logits = lively_model(parameters, **changes)(tokens)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


@pytest.fixture(scope="module")
def logits():
  """Logits of one lively model."""
  lively_parameters()  # The cache is filled here, because it must not be filled inside a trace.
  return jax.jit(lambda tokens, positions, segments=None: lively_model()(tokens, positions, segments))


# Which tokens see which.


def test_causality():
  """The gradient of hidden state t with respect to input s is zero exactly where s > t.

  With random weights every dependence shows in the gradient. Every position gets a token of its own, so that the
  gradient with respect to the embedding tells the inputs apart.
  """
  time = 10
  readout = np.random.default_rng(0).normal(size=CONFIG.hidden_size).astype(np.float32)

  @jax.jit
  @jax.jacrev
  def jacobian(embedding):
    model = lively_model({**lively_parameters(), "embedding": embedding})
    return model.hidden(jnp.arange(time)[None])[0][0] @ readout

  reach_TxT = np.abs(jacobian(lively_parameters()["embedding"])[:, :time]).max(axis=-1)
  np.testing.assert_array_equal(reach_TxT[np.triu_indices(time, 1)], 0.0)
  assert (reach_TxT[np.tril_indices(time)] > 1e-5).all()


def test_only_distances_between_positions_matter(logits):
  tokens = random_tokens((2, 12))
  positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  plain = jax.jit(lively_model())(tokens)
  np.testing.assert_allclose(logits(tokens, positions), plain, atol=1e-5)
  np.testing.assert_allclose(logits(tokens, positions + 17), plain, atol=1e-4)
  assert np.abs(logits(tokens, 2 * positions) - plain).max() > 0.1


@pytest.mark.parametrize("restart", [True, False])
def test_segments_isolate_documents(logits, restart):
  """A packed document gives the logits of the document alone, whether or not positions restart."""
  tokens = random_tokens((2, 12))
  segments = np.tile([1] * 5 + [2] * 4 + [0] * 3, (2, 1)).astype(np.int32)
  counting = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  positions = np.tile([*range(5), *range(4), *range(3)], (2, 1)).astype(np.int32) if restart else counting
  packed = logits(tokens, positions, segments)
  for start, stop in ((0, 5), (5, 9), (9, 12)):
    # The document alone stands at the beginning, where it sees nothing that follows.
    alone = logits(np.roll(tokens, -start, axis=1), counting)[:, : stop - start]
    np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-4)


# The oracle, for the choices that no golden file covers.


@pytest.mark.parametrize(
  "changes",
  [
    {"theta": "gelu_l2_norm", "rotary_fraction": 1.0},
    {"theta": "softmax", "rotary_fraction": 0.0},
    {"gelu": "tanh", "rotary_base": 100.0},
  ],
  ids=lambda changes: next(iter(changes.values())),
)
def test_the_model_equals_the_oracle(changes):
  """Logits, and the loss's slope along a random direction in each parameter."""
  config = dataclasses.replace(CONFIG, **changes)
  tokens, labels = random_tokens((2, 8)), random_tokens((2, 8), seed=1)
  arrays = oracle.wide(to_released(lively_parameters()))

  gradient = jax.jit(jax.grad(functools.partial(loss_and_logits, **changes), has_aux=True))
  grads, logits = gradient(lively_parameters(), tokens, labels)
  np.testing.assert_allclose(logits, oracle.language_model(arrays, tokens, config), atol=5e-5)

  rng = np.random.default_rng(2)
  grads = oracle.wide(to_released(grads))
  largest = max(np.abs(grad).max() for grad in grads.values())
  for name, array in arrays.items():
    direction = rng.normal(size=array.shape)
    slope = oracle.slope(
      lambda x: oracle.cross_entropy(oracle.language_model({**arrays, name: x}, tokens, config), labels),
      array,
      direction,
    )
    noise = (1e-5 * np.abs(grads[name]).max() + 1e-7 * largest) * math.sqrt(array.size)
    np.testing.assert_allclose(np.sum(grads[name] * direction), slope, rtol=1e-5, atol=noise, err_msg=name)


def test_float64():
  """Everything is float64 except the rotary table, as in the released code, and τ."""
  changes = {"compute_dtype": "float64"}
  with pytest.raises(ValueError, match="compute_dtype='float64': JAX has it switched off"):
    LanguageModel(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
  tokens = random_tokens((1, 6))
  with jax.enable_x64(True):
    logits = jax.jit(lively_model(**changes))(tokens)
    assert logits.dtype == np.float64
  expected = oracle.language_model(
    oracle.wide(to_released(lively_parameters())), tokens, dataclasses.replace(CONFIG, **changes)
  )
  np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_bfloat16_is_close_to_float32():
  tokens = random_tokens((2, 12))
  wide = jax.jit(lively_model())(tokens)
  narrow = jax.jit(lively_model(compute_dtype="bfloat16"))(tokens)
  assert narrow.dtype == np.float32
  error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 1e-4 < error < 0.03


# Scan and rematerialisation.


def test_scan_is_the_loop_over_layers():
  tokens = random_tokens((2, 12))
  model = lively_model()
  _, parameters, tau = split(model)
  block = nnx.graphdef(nnx.eval_shape(lambda: Block(CONFIG, rngs=nnx.Rngs(0))))

  def unrolled(tokens):
    x_BxTxD = parameters["embedding"][tokens]
    positions = jnp.arange(12)[None]
    context = Context(positions, rotation(positions, CONFIG.rotary_dims, CONFIG.rotary_base))
    for i in range(CONFIG.num_layers):
      layer = jax.tree.map(lambda leaf: leaf[i], (parameters["blocks"], tau["blocks"]))
      x_BxTxD, _, _ = nnx.merge(block, *layer)(x_BxTxD, context)
    return Norm("plain", CONFIG.hidden_size, rngs=nnx.Rngs(0))(x_BxTxD)

  np.testing.assert_allclose(jax.jit(model.hidden)(tokens)[0], jax.jit(unrolled)(tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.every_combination)])
def test_remat_changes_only_what_is_kept(dtype):
  # More rows than those for which a CPU multiplies with the table on the left.
  tokens, labels = random_tokens((6, 12)), random_tokens((6, 12), seed=1)
  results, kept = {}, {}
  for remat in REMAT_POLICIES:
    loss = functools.partial(loss_and_logits, tokens=tokens, labels=labels, remat=remat, compute_dtype=dtype)
    results[remat] = jax.jit(jax.value_and_grad(loss, has_aux=True))(lively_parameters())
    residuals = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], lively_parameters())
    kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
  for remat in REMAT_POLICIES:
    for ours, none in zip(jax.tree.leaves(results[remat]), jax.tree.leaves(results["none"])):
      tolerance = 1e-5 if dtype == "float32" else 2e-2
      np.testing.assert_allclose(ours, none, rtol=tolerance, atol=tolerance * np.abs(none).max())
  assert kept["full"] < kept["dots"] < kept["none"]


def test_a_layer_keeps_neither_norms_nor_narrowed_parameters():
  """It keeps its input, the middle of its residual stream, q, k and v, the input of proj, and five arrays of scores."""
  tokens = random_tokens((6, 12))
  loss = functools.partial(loss_and_logits, tokens=tokens, labels=tokens, compute_dtype="bfloat16")
  residuals = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], lively_parameters())
  layers = CONFIG.num_layers
  kept = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape[:1] == (layers,)]
  sizes = sorted(leaf.size // (layers * tokens.size) for leaf in kept if leaf.dtype == jnp.bfloat16)
  assert sizes == [16, 25, 25, 25, *[32] * 6, 49]
  # In float32 it keeps numbers for each row, and the parameters themselves.
  parameters = {leaf.shape for leaf in jax.tree.leaves(lively_parameters())}
  assert all(
    leaf.size <= layers * tokens.size for leaf in kept if leaf.dtype == jnp.float32 and leaf.shape not in parameters
  )


# Parameters.


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_the_config_counts_the_declared_parameters(name):
  config = ModelConfig.named(name)
  _, parameters, _ = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
  leaves = jax.tree.leaves(parameters)
  rows = 3 * config.qkv_tokens + config.proj_tokens + config.ffn_tokens
  matrices = config.num_layers * 2 * config.hidden_size * rows
  assert config.num_non_embedding_parameters == matrices
  assert config.num_parameters == config.vocab_size * config.hidden_size + 2 * config.hidden_size + matrices
  assert sum(leaf.size for leaf in leaves) == config.num_parameters
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "softmax"])
def test_tau_is_state_of_each_layer(theta):
  config = dataclasses.replace(CONFIG, theta=theta, compute_dtype="bfloat16")
  _, parameters, tau = split(LanguageModel(config, rngs=nnx.Rngs(0)))
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
  assert not any("tau" in path for path in paths)
  pattentions = {"ffn": tau["blocks"]["ffn"], **tau["blocks"]["attention"]}
  for name, n in {"query": 25, "key": 25, "value": 25, "proj": 16, "ffn": 49}.items():
    assert pattentions[name]["tau"].dtype == jnp.float32
    np.testing.assert_array_equal(pattentions[name]["tau"], [n if theta == "softmax" else math.sqrt(n)] * 3)
  assert len(jax.tree.leaves(tau)) == 5


def test_initialisation():
  """Standard deviations of the released 150M, here with its width and depth and fewer rows."""
  released = json.loads((GOLDEN / "150M_state_dict_keys.json").read_text())
  config = ModelConfig.named("150m", vocab_size=128, qkv_tokens=32, proj_tokens=32, ffn_tokens=64)
  _, parameters, _ = split(jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))())
  ours = to_released(parameters)
  for entry in released:
    array = np.asarray(ours[entry["key"]])
    if "norm" in entry["key"]:
      np.testing.assert_array_equal(array, 1.0 if entry["key"].endswith("weight") else 0.0)
    else:
      np.testing.assert_allclose(array.std(), entry["init_std"], rtol=0.03, err_msg=entry["key"])
      assert abs(array.mean()) < 4 * entry["init_std"] / math.sqrt(array.size), entry["key"]


def test_no_two_arrays_have_the_same_initial_numbers():
  _, parameters, _ = split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
  released = to_released(parameters)
  firsts = [np.asarray(released[name]).ravel()[:8].tobytes() for name in released_names(3) if "norm" not in name]
  assert len(set(firsts)) == len(firsts)


def test_a_seed_determines_the_model():
  make = lambda seed: split(LanguageModel(CONFIG, rngs=nnx.Rngs(seed)))[1]  # noqa: E731
  first, second, other = make(7), make(7), make(8)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert np.any(first["embedding"] != other["embedding"])
