"""A model on a mesh is read into its shards, and writes the text and gives the scores of one device."""

import dataclasses
import functools
import gc
import math
from collections import Counter

import jax
import numpy as np
import pytest

import tokenformer_jax as tf
from tests import communication, small_run
from tests.commands import call
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data import save_tokenizer
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.evaluation.log_likelihood import Request, log_likelihoods
from tokenformer_jax.inference.decoding import decoding_programs
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program

# All arrays that are sent differ in size, so that they can be told apart.
CONFIG = ModelConfig(
  vocab_size=384, num_layers=1, hidden_size=32, num_heads=4, qkv_tokens=24, proj_tokens=16, ffn_tokens=40, seq_length=32
)
MESHES = [dict(fsdp=2, token=4), dict(data=2, fsdp=2, token=2)]
PROMPTS = ["a", "def f(x):", "é", "1 + 1", "for", "x", "yz", "0"]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The work folder of a run with one checkpoint."""
  workdir = tmp_path_factory.mktemp("run")
  run = dataclasses.replace(small_run.config(), model=CONFIG)
  state = small_run.noise(make_program(run, CONFIG, small_run.mesh()).shapes)
  checkpoints = Checkpoints(str(workdir))
  checkpoints.save(1, state, {"model": dataclasses.asdict(CONFIG)})
  checkpoints.close()
  save_tokenizer(ByteTokenizer(), workdir / "tokenizer.json")
  return workdir


def scores_of(model):
  ids = np.random.default_rng(0).integers(0, 256, (9, 20)).tolist()
  requests = [Request(row[:5], row[5:]) for row in ids]
  return [score.log_likelihood for score in log_likelihoods(model, requests, vocab_size=257)]


def texts_of(model):
  return tf.generate(model, ByteTokenizer(), PROMPTS, max_new_tokens=6, temperature=50.0, seed=3)


@pytest.fixture(scope="module")
def model(workdir):
  """The model on one device."""
  return tf.load(str(workdir))


@functools.cache
def on_mesh(workdir, index):
  return tf.load(str(workdir), mesh=small_run.mesh(**MESHES[index]))


@pytest.mark.parametrize("index", range(len(MESHES)), ids=map(str, MESHES))
def test_a_mesh_scores_like_one_device(workdir, model, index):
  np.testing.assert_allclose(scores_of(on_mesh(workdir, index)), scores_of(model), rtol=1e-5)


@pytest.mark.parametrize("index", range(len(MESHES)), ids=map(str, MESHES))
def test_a_mesh_writes_like_one_device(workdir, model, index):
  texts = texts_of(on_mesh(workdir, index))
  assert texts == texts_of(model) and len(set(texts)) == len(PROMPTS)


def held() -> Counter:
  """Bytes of all arrays by the device that holds them."""
  sizes: Counter = Counter()
  shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
  for (device, _), size in {(a.device, a.unsafe_buffer_pointer()): a.nbytes for a in shards}.items():
    sizes[device] += size
  return sizes


def test_no_device_ever_holds_more_than_its_share(workdir, monkeypatch):
  """Neither when a run's checkpoint is restored nor when it is unstacked for decoding."""
  gc.collect()
  before, most = held(), Counter()
  make = jax.make_array_from_single_device_arrays

  def observed(*arguments, **settings):
    array = make(*arguments, **settings)
    for device, size in held().items():
      most[device] = max(most[device], size - before[device])
    return array

  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", observed)
  model = tf.load(str(workdir), mesh=small_run.mesh(fsdp=2, token=4))
  share = sum(leaf.nbytes for leaf in jax.tree.leaves(split(model)[1])) // 8
  assert len(most) == 8 and all(0 < size <= 1.05 * share for size in most.values()), (share, most)
  decoding = model.for_decoding()
  del model
  gc.collect()
  after = held()
  assert all(0.95 * share <= after[device] - before[device] <= 1.05 * share for device in most), (share, after)
  assert decoding.config == CONFIG


@pytest.mark.parametrize("index", range(len(MESHES)), ids=map(str, MESHES))
def test_a_decode_step_sends_what_the_design_says(workdir, index):
  mesh, sizes = small_run.mesh(**MESHES[index]), MESHES[index]
  graphdef, *leaves = split(on_mesh(workdir, index).for_decoding())
  prefill, decode_step = decoding_programs(graphdef, mesh)
  rows = np.zeros(8, np.int32)
  _, cache = prefill(leaves, np.tile(rows[:, None], 16), rows, num_slots=32)
  parts = math.prod(sizes.values())
  assert all(leaf.nbytes == parts * leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache.layers))
  found = collectives(decode_step.lower(leaves, rows, cache).compile().as_text(), mesh)
  assert not any(one.argument for one in found), "no parameter is sent"
  sent = Counter((one.kind, one.axes, math.prod(one.shape)) for one in found)
  assert sent == communication.of_decode_step(CONFIG, 8, **sizes)


def test_int8_tokens_are_split_too(workdir, model):
  pytest.importorskip("qwix")
  sharded = tf.int8_tokens(on_mesh(workdir, 0))
  assert sharded.blocks.ffn.keys[...].addressable_shards[0].data.shape == (1, 10, 16)
  np.testing.assert_allclose(scores_of(sharded), scores_of(tf.int8_tokens(model)), rtol=1e-5)


def test_the_commands_take_the_mesh_of_training(workdir, model):
  flags = [f"--workdir={workdir}", "--mesh.fsdp=2", "--mesh.token=4", "--max_new_tokens=1", "--temperature=0"]
  code, text, said = call("generate", *flags, "--prompt=ab", XLA_FLAGS=FLAGS)
  assert code == 0, said
  assert text == "ab" + tf.generate(model, ByteTokenizer(), "ab", max_new_tokens=1, temperature=0)[0] + "\n"
  code, text, said = call("generate", f"--workdir={workdir}", "--prompt=a", "--mesh.fsdp=3", XLA_FLAGS=FLAGS)
  assert (code, text) == (2, "") and "mesh data=-1, fsdp=3, sequence=1, token=1 takes a multiple of 3" in said[0]
