"""The loss against float64, on one device and on meshes, and the arrays that its compiled program holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from tests import small_run
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import replicated, traced_on
from tokenformer_jax.training.loss import CHUNK, LossSums, loss_sums
from tokenformer_jax.training.program import make_program

ROWS, TIME, WIDTH, VOCAB = 4, 6, 5, 16
LABELS = np.random.default_rng(1).integers(0, VOCAB, (ROWS, TIME), np.int32)
WEIGHTS = (
  np.random.default_rng(2).exponential(size=LABELS.shape) * (np.arange(LABELS.size).reshape(LABELS.shape) % 4 != 0)
).astype(np.float32)
TABLE = np.random.default_rng(3).normal(size=(VOCAB, WIDTH)).astype(np.float32)
Z_LOSS = 0.1


def hidden(scale=1.0):
  return (np.random.default_rng(0).normal(size=(ROWS, TIME, WIDTH)) * scale).astype(np.float32)


def in_float64(scale, weights):
  """[nats, z, weight, nats + Z_LOSS · z], and the gradients of the last with respect to hidden and table."""
  h, table, weights = hidden(scale).astype(np.float64), TABLE.astype(np.float64), weights.astype(np.float64)
  logits = h @ table.T
  log_z = special.logsumexp(logits, axis=-1)
  nats = log_z - np.take_along_axis(logits, LABELS[..., None], axis=-1)[..., 0]
  d_logits = (1 + 2 * Z_LOSS * log_z)[..., None] * special.softmax(logits, axis=-1) - np.eye(VOCAB)[LABELS]
  d_logits *= weights[..., None]
  nats, z = (weights * nats).sum(), (weights * log_z**2).sum()
  return np.array([nats, z, weights.sum(), nats + Z_LOSS * z]), (
    d_logits @ table,
    np.einsum("btv,btd->vd", d_logits, h),
  )


def ours(scale, weights, chunk, arrays=None):
  """[nats, z, weight, the loss], and its gradients with respect to hidden and table, which are the `arrays`."""
  (total, sums), gradients = jax.value_and_grad(
    lambda h, table: loss_sums(h, table, LABELS, weights, Z_LOSS, chunk), argnums=(0, 1), has_aux=True
  )(*arrays or (jnp.asarray(hidden(scale)), jnp.asarray(TABLE)))
  return jnp.stack([*sums, total]), gradients


# A chunk of 5 does not divide the 24 tokens. At scale 1e3 exp of the logits overflows float32.
@pytest.mark.parametrize("chunk", [CHUNK, 8, 5, 1])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["all tokens", "weights"])
def test_sums_and_gradients_are_those_of_float64(chunk, scale, weights):
  sums, gradients = in_float64(scale, np.ones(LABELS.shape) if weights is None else weights)
  got_sums, got_gradients = ours(scale, weights, chunk)
  np.testing.assert_allclose(got_sums, sums, rtol=1e-6)
  small_run.assert_close(dict(enumerate(got_gradients)), dict(enumerate(gradients)), 1e-6)
  _, alone = loss_sums(jnp.asarray(hidden(scale)), jnp.asarray(TABLE), LABELS, weights, Z_LOSS, chunk)
  np.testing.assert_allclose(np.array(alone), sums[:3], rtol=1e-6)  # An evaluation computes no gradients.


@pytest.mark.parametrize(
  "sizes", [dict(data=4), dict(token=8), dict(fsdp=2, sequence=2, token=2), dict(data=8)], ids=str
)  # 8 devices along data cannot split the 4 rows, which stay whole.
def test_every_mesh_gives_the_same(sizes):
  sums, gradients = in_float64(1.0, WEIGHTS)
  mesh = small_run.mesh(**sizes)
  arrays = jax.device_put((hidden(), TABLE), replicated(mesh))
  got_sums, got_gradients = jax.jit(traced_on(mesh, lambda *arrays: ours(1.0, WEIGHTS, 2, arrays)))(*arrays)
  np.testing.assert_allclose(got_sums, sums, rtol=1e-6)
  small_run.assert_close(dict(enumerate(got_gradients)), dict(enumerate(gradients)), 1e-6)


def test_the_sums_of_two_parts_of_a_batch_add_up():
  whole, _ = ours(1.0, WEIGHTS, CHUNK)
  parts = [
    loss_sums(jnp.asarray(hidden()[rows]), jnp.asarray(TABLE), LABELS[rows], WEIGHTS[rows])[1]
    for rows in (slice(0, 1), slice(1, None))
  ]
  np.testing.assert_allclose(np.array(LossSums(*map(sum, zip(*parts)))), np.array(whole)[:3], rtol=1e-6)


MODEL = ModelConfig(
  vocab_size=4104,
  num_layers=2,
  hidden_size=16,
  num_heads=2,
  qkv_tokens=8,
  proj_tokens=8,
  ffn_tokens=16,
  seq_length=CHUNK,
  compute_dtype="bfloat16",
)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
  "sizes", [dict(data=2, token=2), pytest.param({}, marks=pytest.mark.every_combination)], ids=str
)
def test_logits_of_a_batch_never_exist(train, sizes):
  mesh = small_run.mesh(**sizes)
  program = make_program(small_run.config(), MODEL, mesh)
  ids = small_run.placed(data.Batch(*np.zeros((2, 8, CHUNK), np.int32)), mesh)
  lowered = (
    program.train_step.lower(program.shapes, ids)
    if train
    else program.eval_step.lower(program.shapes.params, program.shapes.tau, ids)
  )
  compiled = lowered.compile()
  vocab = MODEL.vocab_size // sizes.get("token", 1)
  shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())]
  with_vocab = {shape for shape in shapes if vocab in shape}
  assert (CHUNK, vocab) in with_vocab and max(map(np.prod, with_vocab)) == CHUNK * vocab


@pytest.mark.parametrize("first, second", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_an_update_overwrites_the_state_it_is_given(first, second):
  moments = dict(first_moment_dtype=first, second_moment_dtype=second)
  program = make_program(small_run.replace(small_run.config(), optimizer=moments), small_run.MODEL, small_run.mesh())
  compiled = program.train_step.lower(program.shapes, small_run.batch()).compile()
  for name, dtype in (("mu", first), ("nu", second)):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree.get(program.shapes.opt_state, name))} == {dtype}
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.shapes))
  assert compiled.memory_analysis().alias_size_in_bytes == held
