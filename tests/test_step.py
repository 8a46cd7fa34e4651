"""The update: micro-batches and the z-loss against formulas, and what a run refuses; meshes: test_sharded_model."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special

from tests import oracle, small_run
from tokenformer_jax.config import REMAT_POLICIES
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.interop.names import to_released
from tokenformer_jax.nn.parameters import Tau, parameter, split
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import check_run, make_program
from tokenformer_jax.training.state import TrainState, initial_state
from tokenformer_jax.training.step import make_train_step
from tokenformer_jax.training.tau import make_tau_rule
from tokenformer_jax.training.weight_average import evaluation_params

VOCAB = small_run.MODEL.vocab_size


class Bigram(nnx.Module):
  """logits = matrix[token]: a model whose gradient is a formula."""

  def __init__(self):
    self.matrix = parameter(nnx.Rngs(0), (VOCAB, VOCAB), ("vocab", "vocab"), nnx.initializers.normal(1.0))
    self.tau = Tau(jnp.ones([]), axes=())

  def hidden(self, tokens, positions, segments, real, training):
    return jax.nn.one_hot(tokens, VOCAB), {}

  def table(self):
    return self.matrix[...].T


def bigram_loss_and_gradient(table, batch, z_loss):
  """(loss, gradient) in float64."""
  inputs, labels = np.asarray(batch.inputs), np.asarray(batch.labels)
  weights = np.ones(labels.shape) if batch.weights is None else np.asarray(batch.weights, np.float64)
  logits = np.asarray(table, np.float64)[inputs]
  log_z = special.logsumexp(logits, axis=-1)
  nats = log_z - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  d_logits = (1 + 2 * z_loss * log_z)[..., None] * special.softmax(logits, axis=-1) - np.eye(VOCAB)[labels]
  gradient = np.zeros((VOCAB, VOCAB))
  np.add.at(gradient, inputs, weights[..., None] * d_logits)
  return (weights * nats).sum() / weights.sum(), gradient / weights.sum()


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_every_product_of_a_bfloat16_step_is_of_bfloat16(remat):
  """This holds forward and backward; products of float32 would take a GPU at least twice as long."""
  config = small_run.replace(CONFIG, model=dict(compute_dtype="bfloat16", remat=remat))
  program = make_program(config, config.model, small_run.mesh())
  text = program.train_step.lower(program.shapes, small_run.batch()).as_text()
  products = [line.rpartition(" : ")[2] for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(products) > 3 * 2 * 5
  assert all(re.fullmatch(r"\(tensor<[\dx]+xbf16>, tensor<[\dx]+xbf16>\) -> .*", line) for line in products), products


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_micro_batches_are_one_batch(accumulation, weights, z_loss):
  batch = small_run.batch(weights=weights)
  graphdef, params, tau = split(Bigram())
  optimizer = optax.with_extra_args_support(optax.sgd(1.0))  # Its updates are the gradients.
  kept = make_tau_rule(small_run.replace(CONFIG, growth=dict(tau="kept")))
  step = make_train_step(graphdef, optimizer, kept, optax.constant_schedule(1.0), z_loss, accumulation)
  state = TrainState(jnp.int32(0), params, tau, optimizer.init(params), (), born=None)
  loss, gradient = bigram_loss_and_gradient(params["matrix"], batch, z_loss)
  new, metrics = jax.jit(step)(state, batch)
  np.testing.assert_allclose(params["matrix"] - new.params["matrix"], gradient, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)  # The z-loss is not in it, so that runs can be compared.
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
  assert new.step == 1


class Speaker(Bigram):
  """A `Bigram` that says the mean of its ids, and pulls its matrix down by as much."""

  def hidden(self, tokens, positions, segments, real, training):
    hidden, _ = super().hidden(tokens, positions, segments, real, training)
    level = jnp.mean(tokens.astype(jnp.float32))
    return hidden, {"level": level, "loss/pull": level * jnp.sum(self.matrix[...])}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_blocks_say_is_logged_and_added_to_the_loss_by_the_weight_of_each_micro_batch(accumulation):
  batch = small_run.batch(weights=True)
  graphdef, params, tau = split(Speaker())
  optimizer = optax.with_extra_args_support(optax.sgd(1.0))
  kept = make_tau_rule(small_run.replace(CONFIG, growth=dict(tau="kept")))
  step = make_train_step(graphdef, optimizer, kept, optax.constant_schedule(1.0), 0.0, accumulation)
  state = TrainState(jnp.int32(0), params, tau, optimizer.init(params), (), born=None)
  new, metrics = jax.jit(step)(state, batch)
  parts = range(accumulation)  # Every accumulation-th row is a micro-batch.
  weights = [batch.weights[part::accumulation].sum(dtype=np.float64) for part in parts]
  level = np.average([batch.inputs[part::accumulation].mean() for part in parts], weights=weights)
  loss, gradient = bigram_loss_and_gradient(params["matrix"], batch, 0.0)
  np.testing.assert_allclose(params["matrix"] - new.params["matrix"], gradient + level, rtol=1e-5)
  assert metrics["loss"] == pytest.approx(loss, rel=1e-6) and metrics["level"] == pytest.approx(level, rel=1e-6)
  assert metrics["loss/pull"] == pytest.approx(level * np.asarray(params["matrix"], np.float64).sum(), rel=1e-4)


@pytest.mark.parametrize(
  "sizes, rows, accumulation, refused",
  [
    (dict(data=8), 8, 8, True),
    (dict(data=4, fsdp=2), 16, 4, True),
    (dict(data=4, fsdp=2), 16, 2, False),
    (dict(token=8), 8, 8, False),  # All devices share the work of every row.
    (dict(data=4, token=2), 8, 2, False),
  ],
)
def test_micro_batches_that_devices_would_have_to_repeat_are_refused(sizes, rows, accumulation, refused):
  config = small_run.replace(
    small_run.config(), data=dict(batch_size=rows), training=dict(gradient_accumulation=accumulation)
  )
  if not refused:
    check_run(config, small_run.mesh(**sizes))
    return
  with pytest.raises(ValueError) as error:
    make_program(config, config.model, small_run.mesh(**sizes))
  assert f"gradient_accumulation={accumulation}: the {rows // accumulation} rows of a micro-batch of" in str(
    error.value
  )
  assert f"data.batch_size={rows} cannot be split over the 8 devices along mesh axes data × fsdp" in str(error.value)
  assert f"choose a data.batch_size that {8 * accumulation} divides" in str(error.value)


CENTRED = dataclasses.replace(small_run.MODEL.attention, shaped="centred")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(optimizer=dict(warmup_steps=1001)), "optimizer.warmup_steps=1001 .* do not fit into training.num_steps=1000"),
    (
      dict(mesh=dict(data=1, sequence=8), model=dict(attention=CENTRED)),
      "mesh.sequence=8 with attention.shaped='centred': .* choose mesh.sequence=1",
    ),
  ],
)
def test_a_run_is_refused_before_its_data_is_read(tmp_path, changes, message):
  config = small_run.replace(small_run.config(f"text:{tmp_path}/none.txt"), **changes)
  with pytest.raises(ValueError, match=message):
    train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def run(program, start, batches):
  """The states after each batch as NumPy arrays, the last state as it is, and the losses."""
  state, states, losses = jax.device_put(start, program.shardings), [], []
  for batch in batches:
    given = state
    state, metrics = program.train_step(given, small_run.placed(batch, program.shardings.step.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))
    states.append(jax.tree.map(np.array, state))
    losses.append(float(metrics["loss"]))
  return states, state, losses


CONFIG = small_run.replace(
  small_run.config(),
  data=dict(batch_size=16),
  optimizer=dict(learning_rate=1e-3),
  training=dict(gradient_accumulation=2),
)
BATCHES = [small_run.batch(rows=16, weights=True)] * 3


@pytest.fixture(scope="module")
def one_device():
  program = make_program(CONFIG, small_run.MODEL, small_run.mesh())
  start = jax.tree.map(np.array, program.initial_state())
  return start, *run(program, start, BATCHES)


def test_first_loss_is_the_oracles(one_device):
  start, _, _, losses = one_device
  batch = BATCHES[0]
  logits = oracle.language_model(oracle.wide(to_released(start.params)), batch.inputs, small_run.MODEL)
  nats = special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, batch.labels[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(losses[0], (nats * batch.weights).sum() / batch.weights.sum(), rtol=1e-6)


def test_an_update_moves_all_parameters_and_tau_never(one_device):
  start, states, last, losses = one_device
  assert losses[0] > losses[1] > losses[2]
  for state in states:
    small_run.assert_same((start.tau, start.born), (state.tau, state.born))
  moved = {
    path: np.any(leaf != leaves_by_path(start.params)[path]) for path, leaf in leaves_by_path(states[0].params).items()
  }
  assert all(moved.values()) and len(moved) == 13
  assert [int(state.step) for state in states] == [1, 2, 3]
  # Only the parameters have moments.
  moments = [path for path, leaf in leaves_by_path(last.opt_state).items() if leaf.ndim]
  assert len(moments) == 26 and not [path for path in moments if "tau" in path]


def test_parameters_begin_the_same_on_a_mesh(one_device):
  start, *_ = one_device
  program = make_program(CONFIG, small_run.MODEL, small_run.mesh(2, 2, 2))

  def some(state):
    return state.params["embedding"], state.params["blocks"]["attention"]["proj"]["values"]

  begin = jax.jit(
    lambda: some(initial_state(small_run.MODEL, program.optimizer, program.tau_rule, CONFIG.training.seed)),
    out_shardings=some(program.shardings),
  )
  small_run.assert_close(begin(), some(start), 1e-6)


def test_bfloat16_compute_keeps_a_float32_state(one_device):
  start, _, _, losses = one_device
  program = make_program(CONFIG, dataclasses.replace(small_run.MODEL, compute_dtype="bfloat16"), small_run.mesh())
  state, metrics = jax.eval_shape(program.train_step, program.shapes, BATCHES[0])
  assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.tau, state.opt_state))} == {
    "float32",
    "int32",
  }
  assert {leaf.dtype.name for leaf in metrics.values()} == {"float32"}
  sums = program.eval_step(start.params, start.tau, BATCHES[0])
  np.testing.assert_allclose(sums.nats / sums.weight, losses[0], rtol=1e-3)
  assert sums.nats / sums.weight != losses[0]  # The rounding shows that it was computed in bfloat16.


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_state_of_every_optimizer_lies_where_its_parameters_do(name):
  optimizer = dict(name=name, eps=1e-8, ema_decay=0.9)
  config = small_run.replace(CONFIG, optimizer=optimizer)
  shapes = make_program(config, config.model, small_run.mesh(2, 2, 2)).shapes
  places = {path: leaf.sharding for path, leaf in leaves_by_path(shapes.params).items()}
  mirrors = {
    path: (leaf.sharding, next(place for name, place in places.items() if path.endswith("/" + name)))
    for path, leaf in leaves_by_path(shapes.opt_state).items()
    if leaf.ndim > 1 and not path.endswith("ns_coeffs")
  }
  # Two moments and the lag of the average; Lion has no second moment, and Muon one only for the embedding.
  assert len(mirrors) == {"adamw": 33, "lion": 22, "muon": 23}[name]
  assert all(place == of_parameter for place, of_parameter in mirrors.values())


def test_without_an_average_the_state_is_that_of_earlier_checkpoints():
  program = make_program(CONFIG, small_run.MODEL, small_run.mesh())
  paths = {path.rpartition("/blocks")[0] for path in leaves_by_path(program.shapes.opt_state) if "blocks" in path}
  counts = {path for path, leaf in leaves_by_path(program.shapes.opt_state).items() if not leaf.ndim}
  assert paths == {"1/mu", "1/nu"} and counts == {"1/count", "3/count"}
  state = TrainState(None, "weights", None, (None, ()), (), None)
  assert evaluation_params(state) == "weights"


@pytest.mark.slow
def test_muon_with_an_average_trains_and_grows():
  config = small_run.replace(CONFIG, optimizer=dict(name="muon", eps=1e-8, ema_decay=0.9), growth=dict(method="exact"))
  mesh = small_run.mesh()
  small, large = (make_program(config, model, mesh) for model in (small_run.MODEL, small_run.GROWN))
  state, losses, batch = small.initial_state(), [], small_run.placed(BATCHES[0], mesh)
  mean = jax.tree.map(np.array, state.params)
  for number in (1, 2, 3):
    state, metrics = small.train_step(state, batch)
    losses.append(float(metrics["loss"]))
    d = min(0.9, number / (number + 9))
    mean = jax.tree.map(lambda mean, new: d * mean + (1 - d) * np.array(new), mean, state.params)
  small_run.assert_close(evaluation_params(state), mean, 1e-5)

  def loss_of_average(program, state):
    sums = program.eval_step(evaluation_params(state), state.tau, batch)
    return float(sums.nats / sums.weight)

  before = loss_of_average(small, state)
  state, *_ = grow_state(state, small_run.MODEL, small_run.GROWN, config.growth, out_shardings=large.shardings)
  # The average grows like the weights: exact growth changes neither of the two functions.
  assert loss_of_average(large, state) == pytest.approx(before, rel=1e-6)
  old = small_run.MODEL.ffn_tokens
  grown = (evaluation_params(state), state.params)
  small_run.assert_same(*[{"new": np.array(tree["blocks"]["ffn"]["values"])[:, old:]} for tree in grown])
  for _ in range(3):
    state, metrics = large.train_step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses == sorted(losses, reverse=True)


def test_duplicate_growth_keeps_the_average_and_its_function():
  """Copies of a value share its lag as they share the value, so that the average is grown like the weights."""
  config = small_run.replace(CONFIG, optimizer=dict(ema_decay=0.9), growth=dict(method="duplicate"))
  model = small_run.MODEL
  double = model.grown(qkv_tokens=2 * model.qkv_tokens, ffn_tokens=2 * model.ffn_tokens)
  state = small_run.noise(make_program(config, model, small_run.mesh()).shapes)
  grown, *_ = grow_state(state, model, double, config.growth)
  for layer in ("attention/query", "ffn", "attention/proj"):
    old, new = ({**leaves_by_path(evaluation_params(s))} for s in (state, grown))
    old, new = ({name: np.array(tree[f"blocks/{layer}/{name}"]) for name in ("keys", "values")} for tree in (old, new))
    copies = new["values"].reshape(len(new["values"]), -1, *old["values"].shape[1:])
    np.testing.assert_allclose(copies.sum(1), old["values"], rtol=1e-5, atol=1e-6)
    small_run.assert_same({"keys": new["keys"]}, {"keys": np.tile(old["keys"], (1, copies.shape[1], 1))})
