"""What TokenFormer computed at commit 7005107: later changes of the code move none of it.

tests/golden/frozen_A.json has sums and norms of every leaf for each Θ; tests/golden/old_run.tar.gz is a work folder that
the training command of that commit wrote. Comparisons allow for roundings alone, since another processor, or a compiler
without optimisations, adds up in another order.
"""

import dataclasses
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import small_run
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.layers import leaves_by_path
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics

GOLDEN = pathlib.Path(__file__).parent / "golden"
FROZEN = json.loads((GOLDEN / "frozen_A.json").read_text())


class Characters:
  vocab_size, end_of_document = 260, 256

  def encode(self, text):
    return [ord(character) for character in text]

  def decode(self, ids):
    return " ".join(map(str, ids))


def assert_sums(tree, expected: dict[str, list[float]], tolerance: float) -> None:
  """Sum and norm of every leaf, in units of the norm."""
  leaves = leaves_by_path(tree)
  assert leaves.keys() == expected.keys()
  for path, leaf in leaves.items():
    leaf = np.asarray(leaf, np.float64)
    total, norm = expected[path]
    found = [leaf.sum(), np.sqrt(np.sum(leaf**2))]
    np.testing.assert_allclose(found, [total, norm], rtol=0, atol=tolerance * max(norm, 1e-30), err_msg=path)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_parameters_steps_growth_and_text_are_what_they_were(theta):
  def frozen(name):
    return FROZEN[f"{theta}/{name}"]

  model = dataclasses.replace(small_run.MODEL, theta=theta)
  config = dataclasses.replace(small_run.config(), model=model)
  mesh = small_run.mesh()
  program = make_program(config, model, mesh)
  state = program.initial_state()
  assert sorted(leaves_by_path(state.params)) + sorted(leaves_by_path(state.tau)) == frozen("paths")
  assert_sums(state.params, frozen("initial"), 1e-6)
  if theta != "softmax":
    target = model.grown(qkv_tokens=16, proj_tokens=24, ffn_tokens=32)
    exact = dataclasses.replace(config.growth, method="exact", value_scale=0.3)
    assert_sums(grow_state(state, model, target, exact, seed=3)[0].params, frozen("grown"), 1e-6)
  losses = []
  for seed in range(3):
    state, metrics = program.train_step(state, small_run.placed(small_run.batch(seed), mesh))
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(losses, frozen("losses"), rtol=1e-6)
  assert_sums(state.params, frozen("after_three_steps"), 1e-4)
  text = tf.generate(nnx.merge(program.graphdef, state.params, state.tau), Characters(), ["ab"], max_new_tokens=8,
                     temperature=0.0)  # fmt: skip
  assert text[0].split() == frozen("generated").split()


@pytest.fixture
def old_run(tmp_path, monkeypatch):
  with tarfile.open(GOLDEN / "old_run.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)  # Its configuration names the text by a relative path.
  return pathlib.Path("old_run/run")


def test_an_old_run_resumes_grows_and_ends_as_it_did(old_run):
  expected, old_rows = tf.load(str(old_run)), read_metrics(str(old_run))
  fields = json.loads((old_run / "config.json").read_text())
  assert fields["growth"]["how"] == "exact"
  shutil.rmtree(old_run / "checkpoints" / "6")
  with pytest.warns(FutureWarning, match="growth.how is now called"):
    config = tf.Config.from_dict(fields)
  loss = train(dataclasses.replace(config, mesh=tf.config.MeshConfig(data=2, fsdp=2, token=2)), str(old_run))
  rows = read_metrics(str(old_run))
  for old, new in zip(old_rows, rows, strict=True):
    for name in ("train/loss", "growth/loss_after", "held_out/loss"):
      assert new.get(name, 0.0) == pytest.approx(old.get(name, 0.0), rel=1e-5), (name, new["step"])
  assert loss == pytest.approx(old_rows[-1]["held_out/loss"], rel=1e-5)
  small_run.assert_close(
    nnx.to_pure_dict(nnx.state(tf.load(str(old_run)))), nnx.to_pure_dict(nnx.state(expected)), 1e-4
  )
