"""Mixture of depths: the oracle's numbers, and one function for whole texts, prompts, steps, padding and packing."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import small_run
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.config.parts import DepthConfig
from tokenformer_jax.distributed import axes, mesh
from tokenformer_jax.evaluation.log_likelihood import log_likelihoods
from tokenformer_jax.evaluation.perplexity import windows
from tokenformer_jax.models import counts
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.depth_routing import RoutedBlock
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.rotary import rotation
from tokenformer_jax.training.flops import product_flops
from tokenformer_jax.training.held_out import held_out_measures
from tokenformer_jax.training.program import make_program

GOLDEN = pathlib.Path(__file__).parent / "golden"
ORACLE = dict(num_layers=1, hidden_size=32, num_heads=4, ffn_tokens=64, rotary_fraction=1.0, norm="rms_norm")
ORACLE |= dict(norm_epsilon=1e-6, attention=dict(positions="rotary", bias="none"), vocab_size=8, seq_length=16)


def oracle_block(a, **depth):
  """(graph definition, parameters) of the oracle's block."""
  config = ModelConfig.named("tiny", "pre-ln", depth=dict(capacity=0.125, every=1, **depth), **ORACLE)
  dense = dict(query="q", key="k", value="v", proj="o")
  params = {
    "router": a["W/router"],
    "block": {
      "norm": {"scale": a["W/n1"]},
      "ffn_norm": {"scale": a["W/n2"]},
      "attention": {ours: {"weight": a[f"W/{theirs}"]} for ours, theirs in dense.items()},
      "ffn": {"keys": a["W/up"].T, "values": a["W/down"]},
    },
  }
  if depth["causal"] == "predictor":
    names = dict(keys="p1", key_biases="pb1", values="p2", bias="pb2")
    params["predictor"] = {ours: a[f"W/{theirs}"] for ours, theirs in names.items()}
  return nnx.graphdef(nnx.eval_shape(lambda: RoutedBlock(config, rngs=nnx.Rngs(0)))), params


@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
@pytest.mark.parametrize("causal, names", [("predictor", ("pred", "pred")), ("auxiliary", ("causal", "router"))])
def test_a_routed_block_equals_the_oracle_in_float64(causal, names, gate):
  a = np.load(GOLDEN / "modA_oracle.npz")
  assert json.loads(str(a["meta_json"]))["k"] == 2
  with jax.enable_x64(True):
    arrays = {name: jnp.asarray(a[name]) for name in a if name[0] == "W"}
    graphdef, params = oracle_block(arrays, gate=gate, causal=causal)

    @jax.jit
    def run(params, x):
      block = nnx.merge(graphdef, params)
      positions = jnp.arange(16)[None]
      angles = positions[:, :, None, None] * 10_000.0 ** (-jnp.arange(0, 8, 2) / 8.0)[None, None, None]
      context = Context(positions, (jnp.cos(angles), jnp.sin(angles)))
      trained, _, said = block(x, Context(positions, context.rotation, training=True))
      return (
        trained,
        block(x, context)[0],
        block.goes_through(x, block.scores(x), context),
        said,
        block.block(x, context)[0],
      )

    trained, causally, goes, said, dense = run(params, jnp.asarray(a["x"]))
  np.testing.assert_allclose(dense, a["y_dense_gate1"], atol=1e-12)
  np.testing.assert_allclose(trained, a[f"y_topk_{gate}"], atol=1e-12)
  np.testing.assert_array_equal(goes, a[f"selected_{names[0]}"])
  np.testing.assert_allclose(causally, a[f"y_causal_{names[1]}_{gate}"], atol=1e-12)
  np.testing.assert_allclose(said["loss/depth"], 0.01 * a[f"bce_{names[1]}"], rtol=1e-12)
  assert said["depth/routed"] == 2 / 16
  np.testing.assert_allclose(said["depth/agreement"], np.mean(a["selected"] == goes))


def small(preset="mod", layers=2, **changes):
  sizes = dict(vocab_size=32, num_layers=layers, hidden_size=16, num_heads=2, ffn_tokens=16, seq_length=16)
  return ModelConfig.named("tiny", preset, **sizes | changes)


def moved(config):
  """(graph definition, state) of a model whose parameters have all been moved, so that about half of the tokens go."""

  @jax.jit
  def make():
    state = nnx.state(tf.LanguageModel(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([a + 0.2 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys)])

  return nnx.graphdef(nnx.eval_shape(lambda: tf.LanguageModel(config, rngs=nnx.Rngs(0)))), make()


IDS = np.random.default_rng(0).integers(0, 32, (2, 8))


@pytest.mark.parametrize("preset, layers", [("mod", 2), pytest.param("sas", 3, marks=pytest.mark.every_combination)])
def test_prompts_and_steps_equal_the_whole_text(preset, layers):
  """Rows of different lengths, with padding on their left, and one row alone."""
  config = small(preset, layers, depth=dict(capacity=0.5))
  graphdef, state = moved(config)

  @jax.jit
  def run(state, ids):
    model = nnx.merge(graphdef, state)
    hidden, said = model.hidden(ids)
    decoding, found = model.for_decoding(), []
    padded = jnp.concatenate([jnp.zeros((2, 2), ids.dtype), ids], axis=1).at[1].set(jnp.pad(ids[1], (2, 0)))
    prompt, cache = decoding.prefill(padded[:, :6], jnp.full(2, 2), 10)
    found.append((hidden[:, :4], prompt[:, 2:]))
    step, cache = decoding.extend(padded[:, 6:7], cache)
    found.append((hidden[:, 4:5], step))
    found.append((hidden[:, 5:], decoding.extend(padded[:, 7:], cache)[0]))
    prompt, cache = decoding.prefill(ids[:1, :6], jnp.zeros(1, jnp.int32), 8)
    found.append((hidden[:1, :6], prompt))
    step, cache = decoding.extend(ids[:1, 6:7], cache)
    found.append((hidden[:1, 6:7], step))
    return found, said["depth/routed"], cache.layers[-1].filled

  found, routed, filled = run(state, IDS)
  for whole, part in found:
    np.testing.assert_allclose(part, whole, atol=1e-5)
  assert 0.1 < routed < 0.9 and 0 < filled[0] < 7


def test_documents_in_one_row_are_routed_as_if_alone():
  graphdef, state = moved(small(depth=dict(capacity=0.5)))
  hidden = jax.jit(lambda state, *batch: nnx.merge(graphdef, state).hidden(*batch)[0])
  packed = hidden(state, IDS[:1], jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]), jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]]))
  np.testing.assert_allclose(packed[:, :3], hidden(state, IDS[:1])[:, :3], atol=1e-5)
  alone = hidden(state, np.roll(IDS[:1], -3, axis=1))
  np.testing.assert_allclose(packed[:, 3:], alone[:, :5], atol=1e-5)


@pytest.mark.parametrize("choice, fields", [("token", dict(gate="sigmoid")), ("random", {})])
def test_other_choices_keep_the_capacity_and_leave_padding_alone(choice, fields):
  block = RoutedBlock(small(depth=dict(capacity=0.25, choice=choice, **fields)), rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(block)
  x, real = jax.random.normal(jax.random.key(0), (2, 8, 16)), jnp.arange(8)[None] >= jnp.array([[0], [6]])

  def run(state, x):
    positions = jnp.arange(8)[None]
    context = Context(positions, rotation(positions, 8, 1e4), real=real, training=True)
    y, _, said = nnx.merge(graphdef, state)(x, context)
    return y, said["depth/routed"], said.get("loss/depth")

  y, routed, balance = jax.jit(run)(state, x)
  changed = np.any(y != x, axis=-1)
  assert changed.sum(axis=1).max() <= 2 and 1 <= changed.sum() and not np.any(changed & ~real)
  np.testing.assert_allclose(routed, changed.sum() / 10, rtol=1e-6)
  assert (balance is None) == (choice == "random")


def test_flops_of_training_fall_with_the_capacity():
  """The products of the traced program, against the formula that the logs use."""
  flops = {}
  for capacity in (1.0, 0.25):
    config = small(seq_length=64, vocab_size=16, depth=dict(capacity=capacity))
    abstract = nnx.eval_shape(lambda: tf.LanguageModel(config, rngs=nnx.Rngs(0)))
    traced = jax.jit(lambda model, ids: model.logits(model.hidden(ids, training=True)[0])).trace(
      abstract, jnp.zeros((1, 64), int)
    )
    flops[capacity] = product_flops(traced.jaxpr), 64 * counts.forward_flops_per_token(config)
  # The formula counts half of the pairs of tokens, the program all of them where there are few.
  pairs = {capacity: 64 * 64 * 16 * 2 * (1 + capacity**2) for capacity in flops}
  for capacity, (program, formula) in flops.items():
    assert abs(program - formula - pairs[capacity]) < 0.02 * program
  assert flops[0.25][0] < 0.72 * flops[1.0][0]


def test_a_program_has_the_same_size_for_more_layers():
  def lines(layers):
    abstract = nnx.eval_shape(lambda: tf.LanguageModel(small("mode-staged", layers), rngs=nnx.Rngs(0)))
    graphdef, *leaves = split(abstract)

    def gradient(params, tau):
      return jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params, tau).hidden(IDS, training=True)[0]))(params)

    return len(jax.jit(gradient).lower(*leaves).as_text().splitlines())

  assert lines(4) == lines(8)


def test_experts_in_routed_blocks_grow_exactly():
  config = small("mode-staged", ffn=dict(experts=3), depth=dict(capacity=0.5))
  model = nnx.merge(*moved(config))
  bigger, _ = tf.grow(model, ffn_tokens=24)
  assert getattr(bigger.blocks, "1").block.ffn.keys.shape == (1, 3, 24, 16)
  hidden = jax.jit(lambda model, ids: model.hidden(ids)[0])
  np.testing.assert_allclose(hidden(bigger, IDS), hidden(model, IDS), atol=1e-5)
  with pytest.raises(ValueError, match="has a router .* cannot be shrunk"):
    tf.shrink(model, [IDS], ffn_tokens=8)


def test_a_run_trains_routers_of_both_kinds_on_a_mesh():
  """Experts split over `token`; what the routers say is finite, and their losses reach their parameters."""
  model = small("mode-staged", vocab_size=264, num_heads=2, ffn=dict(experts=4, capacity=1.0))
  config = dataclasses.replace(small_run.config(), model=model)
  program = make_program(config, model, small_run.mesh(data=2, token=2))
  state = program.initial_state()
  before = jax.device_get(state.params["blocks"]["1"])
  batch = small_run.batch()
  measured = held_out_measures(program, state, {"main": [batch]})["main"]
  state, metrics = program.train_step(state, batch)
  np.testing.assert_allclose(measured["loss_as_trained"], metrics["loss"], rtol=1e-5)
  assert measured["loss"] != measured["loss_as_trained"]
  assert {"loss/balance", "loss/depth", "depth/routed", "router/dropped"} <= metrics.keys()
  assert all(np.isfinite(value) for value in metrics.values()) and metrics["depth/routed"] == 2 / 16
  after = jax.device_get(state.params["blocks"]["1"])
  for moved in (
    lambda tree: tree["router"],
    lambda tree: tree["predictor"]["keys"],
    lambda tree: tree["block"]["ffn"]["router"],
  ):
    assert np.any(moved(after) != moved(before))


def test_texts_are_scored_under_the_causal_rule_and_as_in_training():
  """Windows of which one is padded: padding is not chosen, and the losses are those of the model itself."""
  graphdef, state = moved(small(vocab_size=260, depth=dict(capacity=0.25)))
  model, ids = nnx.merge(graphdef, state), np.concatenate([IDS.ravel(), IDS.ravel()[:5]])
  requests = list(windows(ids, 31, 16, 16))

  @functools.partial(jax.jit, static_argnums=2)
  def nats(state, row, training):
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(row[None, :16], real=(row[None, :16] >= 0), training=training)
    scores = jax.nn.log_softmax(model.logits(hidden)[0])
    return -jnp.sum(jnp.where(row[1:] >= 0, scores[jnp.arange(16), row[1:]], 0.0))

  first = jnp.array([31, *ids[:16]])
  found = [
    [-score.log_likelihood for score in log_likelihoods(model, requests, 260, as_trained=one)] for one in (False, True)
  ]
  np.testing.assert_allclose(
    [of_all[0] for of_all in found], [nats(state, first, one) for one in (False, True)], rtol=1e-5
  )
  assert len(requests) == 2 and found[0] != found[1] and np.all(np.isfinite(found))


def test_devices_that_split_positions_are_refused():
  block = RoutedBlock(small(), rngs=nnx.Rngs(0))
  run = axes.traced_on(
    mesh.make_mesh(MeshConfig(sequence=2, data=4)), lambda x: block(x, Context(jnp.arange(8)[None]))[0]
  )
  with pytest.raises(ValueError, match=r"mesh.sequence > 1 with depth.capacity=0.125: .* choose mesh.sequence=1"):
    jax.eval_shape(run, jnp.zeros((4, 8, 16)))


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: DepthConfig(capacity=0.0), r"capacity=0.0: must be in \(0, 1\]"),
    (lambda: DepthConfig(capacity=0.5, choice="token"), "gate='linear': choice='token'"),
    (lambda: DepthConfig(capacity=0.5, choice="random", causal="auxiliary"), "causal='auxiliary': choice='random'"),
    (lambda: DepthConfig(every=3), "every=3: capacity=1.0 routes nothing"),
    (lambda: small(layers=5), "num_layers=5: depth.every=2: blocks repeat in 2s; choose 4 or 6"),
    (lambda: small("sas", 2, depth=dict(capacity=0.5)), "num_layers=2: .* behind a first one; choose 3"),
  ],
)
def test_bad_choices_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()
