"""Every combination of parts is right or refused: presets × projections, and residual topologies × projections × attention.

The usual run takes some presets; `pytest -m every_combination` takes the others. Everything that a combination computes is one compiled program on eight simulated devices.
"""

import dataclasses
import functools
import itertools
import json
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import tokenformer_jax as tf
from tests import small_run
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.parts import PROJECTIONS
from tokenformer_jax.config.presets import LANGUAGE_MODELS
from tokenformer_jax.distributed.axes import traced_on, tree_shardings
from tokenformer_jax.distributed.mesh import MESH_AXES
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import declared, logical_axes, split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.state import fresh_state
from tokenformer_jax.training.step import make_train_step
from tokenformer_jax.training.tau import make_tau_rule

SIZES = dict(data=2, fsdp=2, token=2)
SPLIT = {"vocab", "param_token", "heads", "embed"}  # Each of these axes is split in two.
SMALL = dict(vocab_size=32, num_layers=2, hidden_size=16, num_heads=2, seq_length=8)
IDS = np.random.default_rng(0).integers(0, 32, (8, 9)).astype(np.int32)
RUN = small_run.replace(small_run.config(), optimizer=dict(name="muon"))
PROMPT = 5  # Tokens that are read at once; the others are read after them.

# The other presets differ from these in few parts.
USUAL = (
  "tokenformer",
  "transformer",
  "gpt-neox",
  "sas-p",
  "sas-no-norm",
)
QUICK = ("tokenformer", "sas-p")
RESIDUALS = {
  "sequential": {},
  "post-norm": dict(norms="post"),
  "skipless": dict(trained=True, attention_skip=0.0, ffn_gain=0.1),
  "parallel": dict(parallel=True),
  "skipless-parallel": dict(parallel=True, norms="shared", trained=True, ffn_skip=0.0, ffn_gain=0.1),
}


# Blocks that only some of the tokens go through, or with a router in the place of the feed-forward.
MIXTURES = ("tokenformer-groups", "mixtral", "mod", "mode-integrated")


def small(preset: str, projection: str = "", **changes) -> ModelConfig:
  config = ModelConfig.named("tiny", preset, projection, **SMALL, ffn_tokens=8, **changes)
  return config.grown(**dict.fromkeys([count for count in ("qkv_tokens", "proj_tokens") if getattr(config, count)], 8))


def combinations():
  for preset, projection in itertools.product(LANGUAGE_MODELS, ("", *PROJECTIONS)):
    if projection != ModelConfig.named("tiny", preset).attention.projection:
      usual = () if preset in QUICK else pytest.mark.slow
      marks = usual if preset in USUAL and not projection else pytest.mark.every_combination
      make = functools.partial(small, preset, projection)
      yield pytest.param(make, id=f"{preset}-{projection}".rstrip("-"), marks=marks)
  # Norms and positions take turns.
  turns = itertools.cycle(itertools.product(("plain", "rms_norm", "none"), ("rotary", "learned", "sinusoidal")))
  for residual, projection, shaped in itertools.product(RESIDUALS, PROJECTIONS, ("none", "centred")):
    norm, positions = next(turns)
    attention = dict(shaped=shaped, positions=positions, num_kv_heads=1 if shaped == "none" else 0)
    changes = dict(norm=norm, attention=attention, residual=RESIDUALS[residual])
    make = functools.partial(small, "tokenformer", projection, **changes)
    yield pytest.param(
      make, id=f"{residual}-{projection}-{shaped}-{norm}-{positions}", marks=pytest.mark.every_combination
    )
  for residual, preset, projection in itertools.product(RESIDUALS, MIXTURES, PROJECTIONS):
    make = functools.partial(small, preset, projection, residual=RESIDUALS[residual])
    yield pytest.param(make, id=f"{residual}-{preset}-{projection}", marks=pytest.mark.every_combination)


@pytest.mark.parametrize("make", list(combinations()))
def test_a_combination_is_right_or_refused(make, tmp_path, caplog):
  try:
    config = make()
  except ValueError as error:
    assert re.search("tokens have no orthogonal start|groups are of parameter tokens", str(error)) and "\n" not in str(
      error
    )
    return
  caplog.set_level(logging.WARNING)
  assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config

  mesh = small_run.mesh(**SIZES)
  program = make_program(dataclasses.replace(RUN, model=config), config, mesh)
  check_declarations(program, config)
  params, tau = drawn(program.shapes.params), jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), program.shapes.tau)
  assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
  axes, _ = logical_axes(abstract_model(config))
  result = jax.jit(traced_on(mesh, functools.partial(everything, config, program.graphdef, axes)))(params, tau)

  first, second, third = result["losses"]
  assert np.isfinite(first) and first > second > third
  scale = np.max(np.abs(result["logits"]))
  np.testing.assert_allclose(result["decoded"], result["logits"], atol=2e-5 * scale)
  np.testing.assert_allclose(result["grown"], result["logits"], atol=1e-5 * scale)
  check_loading(tmp_path / "run", config, result["state"])
  assert [record.getMessage() for record in caplog.records] == []

  numbers = (4, 6) if len(config.pattern) == 2 else (3, 6)
  layers = [num_lines_lowered(dataclasses.replace(config, num_layers=number)) for number in numbers]
  assert layers[0] == layers[1]


def drawn(shapes):
  """Parameters of order one third, where their shardings say."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(0.2, 0.3, leaf.shape).astype(np.float32), leaf.sharding), shapes
  )


def check_declarations(program, config):
  """Asserts that each device holds the part of a parameter that the axes declare, and that norms and gains stay."""
  abstract = abstract_model(config)
  axes, decayed = (declared(abstract, nnx.Param, name) for name in ("axes", "decayed"))

  def check(leaf, axes, decayed):
    parts = 2 ** len(SPLIT.intersection(axes))
    assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * parts == leaf.size, (leaf, axes)
    assert decayed == (len([axis for axis in axes if axis != "layer"]) > 1), (leaf, axes)

  jax.tree.map(check, program.shapes.params, axes, decayed)


def everything(config, graphdef, axes, params, tau):
  """Three training steps, and of the trained model the logits, those of cached decoding and those after growth."""
  optimizer = optax.with_extra_args_support(optax.sgd(1e-3))
  tau_rule = make_tau_rule(small_run.config())
  step = make_train_step(graphdef, optimizer, tau_rule, optax.constant_schedule(1.0), 0.0, 1)
  batch = data.Batch(jnp.asarray(IDS[:, :-1]), jnp.asarray(IDS[:, 1:]))
  state = fresh_state(params, tau, axes, optimizer, tau_rule)
  state, metrics = jax.lax.scan(lambda state, _: step(state, batch), state, length=3)

  model = nnx.merge(graphdef, state.params, state.tau)
  decoding, inputs = model.for_decoding(), batch.inputs
  read, cache = decoding.prefill(inputs[:, :PROMPT], jnp.zeros(len(inputs), jnp.int32), config.seq_length)
  extended, _ = decoding.extend(inputs[:, PROMPT:], cache)
  # Copies of rows are no random numbers, which would take as long to compile as all the rest. Groups are not copied.
  method = "exact" if config.ffn.group_tokens else "duplicate"
  bigger, _ = tf.grow(model, ffn_tokens=2 * config.ffn_tokens, method=method)
  return dict(
    state=state,
    losses=metrics["loss"],
    logits=model(inputs),
    decoded=decoding.logits(jnp.concatenate([read, extended], axis=1)),
    grown=bigger(inputs),
  )


def check_loading(workdir, config, state):
  """Asserts that a checkpoint gives the configuration and every bit back."""
  checkpoints = Checkpoints(str(workdir))
  checkpoints.save(3, state, {"model": dataclasses.asdict(config), "config": {}})
  checkpoints.close()
  loaded = tf.load(str(workdir))
  assert loaded.config == config
  small_run.assert_same(split(loaded)[1:], (state.params, state.tau))


def num_lines_lowered(config):
  """The number of lines of the program of the parameters' gradient, lowered for TPUs that are not present."""
  mesh = AbstractMesh(tuple(SIZES.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
  abstract = abstract_model(config)
  graphdef, *trees = split(abstract)
  shapes = [
    jax.tree.map(lambda leaf, s: leaf.update(sharding=s), tree, tree_shardings(mesh, axes, tree))
    for tree, axes in zip(trees, logical_axes(abstract))
  ]

  def gradient(params, tau):
    return jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params, tau).hidden(IDS[:, :-1])[0]))(params)

  lowered = jax.jit(traced_on(mesh, gradient)).trace(*shapes).lower(lowering_platforms=("tpu",))
  return len(lowered.as_text().splitlines())


def test_a_first_block_needs_another():
  with pytest.raises(ValueError, match="num_layers=1: .*; choose at least 2"):
    dataclasses.replace(small("sas"), num_layers=1)
