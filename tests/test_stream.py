"""Growing a work folder in slices: what growth in memory gives, the source untouched, all of the target or nothing."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from tests import small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax import data
from tokenformer_jax.growth import stream
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.training import resize
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resize import grow_run
from tokenformer_jax.training.resume import stored_config
from tokenformer_jax.training.run_log import read_metrics

STEP = 40
TOKENS = dict(qkv_tokens=GROWN.qkv_tokens, proj_tokens=GROWN.proj_tokens, ffn_tokens=GROWN.ffn_tokens)
CONFIG = small_run.config(stages=[small_run.stage(50, GROWN.grown(ffn_tokens=64))])
TINY_SLICES = 600  # Less than one layer of a leaf [2, 16, 16], more than one of [2, 8, 16].
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tokenformer_jax.training.resize"])


def shapes(config=CONFIG, model=MODEL):
  return make_program(config, model, small_run.mesh()).shapes


def write_source(workdir, config=CONFIG):
  tokenizer = data.open_tokenizer("bytes")
  # Noise, but for the counts of updates: a row cannot be younger than its optimizer.
  state = jax.tree.map(
    lambda leaf: leaf if leaf.ndim or leaf.dtype.kind != "i" else jax.numpy.int32(STEP),
    small_run.noise(shapes(config, config.model)),
  )
  checkpoints = Checkpoints(str(workdir))
  checkpoints.save(
    STEP,
    state,
    {
      "model": dataclasses.asdict(config.model),
      "config": config.to_dict(),
      "data": {"next_batch": STEP},
      "fingerprint": {"a": 1},
      "tokenizer": tokenizer.fingerprint,
    },
  )
  checkpoints.close()
  (workdir / "config.json").write_text(json.dumps(config.to_dict()))
  data.save_tokenizer(tokenizer, workdir / "tokenizer.json")
  return workdir


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The work folder of a run at STEP, each layer of a large leaf a chunk; not to be changed."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream, "SLICE_BYTES", TINY_SLICES)
    return write_source(tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(autouse=True)
def tiny_slices(monkeypatch):
  monkeypatch.setattr(stream, "SLICE_BYTES", TINY_SLICES)


def restored(workdir, config, model):
  return Checkpoints(str(workdir)).restore(STEP, shapes(config, model))


# Slices.


@pytest.mark.parametrize(
  "shape, rows", [((), 1), ((7,), 7), ((12, 10, 5), 1), ((12, 10, 5), 5), ((1, 400), 1), ((300, 2), 100)]
)
def test_slices_are_all_rows_in_order_and_small(shape, rows):
  leaf = stream.LeafStream(shape, np.dtype("float32"), rows, read=None)
  slices = leaf.slices()
  assert [start for start, _ in slices] == [0, *[stop for _, stop in slices[:-1]]]
  assert slices[-1][1] == (shape[0] if shape else 1)
  for start, stop in slices:
    assert start % rows == 0 and (stop - start <= rows or (stop - start) * leaf.nbytes <= TINY_SLICES * shape[0])


# What is grown.


@pytest.mark.parametrize(
  "method",
  [
    "live",
    "duplicate",
    *(pytest.param(method, marks=pytest.mark.every_combination) for method in ("exact", "released")),
  ],
)
def test_the_grown_checkpoint_is_that_of_growth_in_memory(source, tmp_path, method):
  before = small_run.folder_digest(source)
  report = grow_run(str(source), str(tmp_path / "grown"), method=method, **TOKENS)
  config = stored_config(str(tmp_path / "grown"))
  state = restored(source, CONFIG, MODEL)
  expected, _, in_memory = grow_state(state, MODEL, GROWN, config.growth, seed=CONFIG.training.seed)
  small_run.assert_same(restored(tmp_path / "grown", config, GROWN), expected)
  assert report == in_memory
  assert config == dataclasses.replace(CONFIG, model=GROWN, growth=dataclasses.replace(CONFIG.growth, method=method))
  old, new = (Checkpoints(str(folder)).record(STEP) for folder in (source, tmp_path / "grown"))
  config_record = json.loads(json.dumps(config.to_dict()))
  assert new == old | {"model": dataclasses.asdict(GROWN), "config": config_record, "losses": []}
  assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  assert small_run.folder_digest(source) == before and os.listdir(tmp_path) == ["grown"]


def test_no_more_than_a_layer_of_a_large_leaf_is_read_at_a_time(source, tmp_path, monkeypatch):
  read = {}
  open_leaf = stream._open

  async def open_and_watch(info):
    leaf = await open_leaf(info)

    def watched(start, stop):
      read.setdefault(info.name, []).append((start, stop))
      return leaf.read(start, stop)

    return dataclasses.replace(leaf, read=watched)

  monkeypatch.setattr(stream, "_open", open_and_watch)
  grow_run(str(source), str(tmp_path / "grown"), ffn_tokens=32)
  assert len(read) == len(leaves_by_path(shapes()))
  assert all(
    read[name] == [(0, 1), (1, 2)] for name in read if name.endswith(("keys", "values")) and "born" not in name
  )


def test_growths_that_are_done_leave_the_configuration_and_those_to_come_stay(source, tmp_path):
  run = shutil.copytree(source, tmp_path / "run")
  past = small_run.stage(30, MODEL)
  config = dataclasses.replace(CONFIG, growth=dataclasses.replace(CONFIG.growth, stages=(past, *CONFIG.growth.stages)))
  (run / "config.json").write_text(json.dumps(config.to_dict()))
  grow_run(str(run), str(tmp_path / "grown"), token_axis=4, ffn_tokens=32)
  grown = stored_config(str(tmp_path / "grown"))
  assert grown.growth == CONFIG.growth and grown.mesh == dataclasses.replace(CONFIG.mesh, token=4)


@pytest.mark.slow
def test_train_goes_on_on_a_wider_mesh_as_after_growth_inside_the_run(tmp_path):
  (tmp_path / "text.txt").write_text(small_run.TEXT)

  def config(stages=(), num_steps=2):
    return small_run.config(f"text:{tmp_path}/text.txt", stages, num_steps=num_steps, log_every=1)

  train(config(), str(tmp_path / "run"))
  grow_run(str(tmp_path / "run"), str(tmp_path / "grown"), token_axis=8, **TOKENS)
  onward = small_run.replace(stored_config(str(tmp_path / "grown")), training=dict(num_steps=5))
  train(onward, str(tmp_path / "grown"))
  train(config([small_run.stage(2)], 5), str(tmp_path / "whole"))
  after = [
    {row["step"]: row["train/loss"] for row in read_metrics(str(tmp_path / name)) if "train/loss" in row}
    for name in ("grown", "whole")
  ]
  assert list(after[0]) == [3, 4, 5]
  np.testing.assert_allclose(list(after[0].values()), [after[1][step] for step in after[0]], rtol=1e-5)


# All of it or nothing.


def grow_and_be_killed(source, output, moment):
  def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

  write, left = stream._write, [moment]

  def write_or_die(*args):
    if not left[0]:
      die()
    left[0] -= 1
    write(*args)

  stream.SLICE_BYTES = TINY_SLICES
  if moment == "committed":
    resize.CheckpointStreams.close = die
  else:
    stream._write = write_or_die
  grow_run(str(source), str(output), ffn_tokens=32)


@pytest.mark.slow
@pytest.mark.parametrize(
  "moment", [40, "committed", *(pytest.param(slices, marks=pytest.mark.every_combination) for slices in (0, 1, 25, 59))]
)
def test_killed_it_leaves_the_source_and_no_target_and_a_rerun_gives_the_same(source, tmp_path, moment):
  before, target = small_run.folder_digest(source), tmp_path / "grown"
  process = PROCESSES.Process(target=grow_and_be_killed, args=(source, target, moment))
  process.start()
  process.join(timeout=300)
  assert process.exitcode == -signal.SIGKILL
  assert not target.exists() and os.listdir(tmp_path) == ["grown.unfinished"]
  assert small_run.folder_digest(source) == before
  for output in (target, tmp_path / "undisturbed"):
    grow_run(str(source), str(output), ffn_tokens=32)
  config = stored_config(str(target))
  assert config == stored_config(str(tmp_path / "undisturbed"))
  small_run.assert_same(*(restored(folder, config, config.model) for folder in (target, tmp_path / "undisturbed")))
  records = [Checkpoints(str(folder)).record(STEP) for folder in (target, tmp_path / "undisturbed")]
  assert records[0] == records[1] and sorted(os.listdir(tmp_path)) == ["grown", "undisturbed"]


# Orbax leaves tasks behind in the loop that the failure closes; when they are collected, they say so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_lacks_a_leaf_is_not_finished(source, tmp_path, monkeypatch):
  write = stream._write
  monkeypatch.setattr(stream, "_write", lambda leaf, info: info.name.endswith("ffn.keys") or write(leaf, info))
  with pytest.raises(Exception, match="ffn.keys"):
    grow_run(str(source), str(tmp_path / "grown"), ffn_tokens=32)
  assert not os.listdir(tmp_path)


# Mistakes.


def overwrite(run, name, text):
  (run / name).write_text(text)


def damage(run):
  for path in (run / "checkpoints" / str(STEP)).rglob("ocdbt.process_0/d/*"):
    path.write_bytes(path.read_bytes()[:100])


OTHER = small_run.replace(CONFIG, model=dict(num_layers=3))
MISTAKES = {
  "no change": (
    lambda run: None,
    dict(ffn_tokens=16),
    "growth changes nothing: qkv_tokens=8, proj_tokens=8, ffn_tokens=16",
  ),
  "fewer": (lambda run: None, dict(ffn_tokens=15), "ffn_tokens: 16 -> 15: growth cannot take rows away"),
  "a stage to come has fewer": (
    lambda run: None,
    dict(ffn_tokens=65),
    "ffn_tokens at step 50=64: growth cannot remove",
  ),
  "a mesh that does not divide": (
    lambda run: None,
    dict(proj_tokens=12, token_axis=8),
    "blocks/attention/proj/keys: param_token=12 cannot be split over the 8 devices",
  ),
  "no such step": (lambda run: None, dict(step=39, ffn_tokens=32), "no checkpoint of step 39; there are 40"),
  "an interrupted source": (
    lambda run: shutil.rmtree(run / "checkpoints" / "40" / "optimizer"),
    dict(ffn_tokens=32),
    "no checkpoint there; train first",
  ),
  "a damaged source": (
    damage,
    dict(ffn_tokens=32),
    "no checkpoint there; .*checkpoints/40: its file .* has another size",
  ),
  "another model's configuration": (
    lambda run: overwrite(run, "config.json", json.dumps(OTHER.to_dict())),
    dict(ffn_tokens=32),
    "at step 40 has num_layers=2, this run's would have 3",
  ),
  "no configuration": (lambda run: (run / "config.json").unlink(), dict(ffn_tokens=32), "no config.json there"),
  "something else for a configuration": (
    lambda run: overwrite(run, "config.json", "{"),
    dict(ffn_tokens=32),
    "config.json: not the configuration of a run",
  ),
  "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), dict(ffn_tokens=32), "tokenizer.json cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_written(source, tmp_path, mistake):
  break_it, flags, message = MISTAKES[mistake]
  run = shutil.copytree(source, tmp_path / "run")
  break_it(run)
  before = small_run.folder_digest(tmp_path)
  with pytest.raises(ValueError, match=message):
    grow_run(str(run), str(tmp_path / "grown"), **flags)
  assert small_run.folder_digest(tmp_path) == before


@pytest.mark.parametrize(
  "output, message",
  [
    ("run", "run: already there; choose another"),
    ("empty", "already there"),
    ("run/grown", "lies in the run's own folder"),
    ("gs://a/b", "local disk"),
  ],
)
def test_a_target_that_cannot_be_is_refused(source, tmp_path, output, message):
  run = shutil.copytree(source, tmp_path / "run")
  (tmp_path / "empty").mkdir()
  before = small_run.folder_digest(tmp_path)
  with pytest.raises(ValueError, match=message):
    grow_run(str(run), output if "://" in output else str(tmp_path / output), **TOKENS)
  assert small_run.folder_digest(tmp_path) == before
