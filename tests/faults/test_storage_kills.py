"""Kills and errors at file operations of saves, deletions and growth, including those of tensorstore.

The usual run takes a sample, whose seed is printed; `pytest -m every_operation` takes all, and with OPERATIONS=3/8 in the
environment the third eighth of them.
"""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import small_run
from tests.small_run import MODEL
from tokenformer_jax import data
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resize import grow_run

HERE = pathlib.Path(__file__).parent
CONFIG = small_run.config(num_steps=4)
SHAPES = make_program(CONFIG, MODEL, small_run.mesh()).shapes
GROWN = MODEL.grown(ffn_tokens=32)
RECORD = {"model": dataclasses.asdict(MODEL), "data": {"next_batch": 4}, "config": CONFIG.to_dict()}
RECORD["tokenizer"] = data.open_tokenizer("bytes").fingerprint


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  compiler = shutil.which("gcc") or shutil.which("cc")
  if sys.platform != "linux" or compiler is None:
    pytest.skip("the interposed library needs Linux and a C compiler.")
  path = tmp_path_factory.mktemp("library") / "fail_at.so"
  subprocess.run(
    [compiler, "-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", HERE / "fail_at.c", "-o", path, "-ldl"], check=True
  )
  return path


def children(library, scenario, folder, numbers, error=0):
  """Returns {number: (exit code, file operations)}."""
  command = [sys.executable, "-m", "tests.faults.failing_children", scenario, folder, str(error), *map(str, numbers)]
  done = subprocess.run(
    command,
    cwd=HERE.parent.parent,
    env=os.environ | {"LD_PRELOAD": str(library), "JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
    check=True,
    timeout=3000,
  )
  rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  return {number: (code, operations) for number, code, operations in rows}


def chosen(request, total, count):
  """All operations where `-m every_operation` asked for them, otherwise a sample with the last ones, the commit's."""
  if request.node.get_closest_marker("every_operation"):
    if "every_operation" not in request.config.option.markexpr:
      pytest.skip("takes many minutes: pytest -m every_operation")
    part, parts = map(int, os.environ.get("OPERATIONS", "1/1").split("/"))
    return list(range(part, total + 1, parts))
  seed = random.randrange(2**32)
  print("seed", seed)
  return sorted(random.Random(seed).sample(range(1, total + 1), count))


def prepare(folder, workdir, step):
  checkpoints = Checkpoints(str(workdir))
  checkpoints.save(step, small_run.noise(SHAPES, step), RECORD)
  checkpoints.close()
  state = jax.tree.map(np.asarray, small_run.noise(SHAPES, 4))  # The children need not make a program.
  (folder / "state.pickle").write_bytes(pickle.dumps((state, RECORD)))


@pytest.fixture(scope="module")
def saving(library, tmp_path_factory):
  """(folder for children that save step 4 beside step 2, number of their file operations)."""
  tmp_path = tmp_path_factory.mktemp("saving")
  prepare(tmp_path, tmp_path / "start", 2)
  ((code, operations),) = children(library, "save", tmp_path, [0]).values()
  assert code == 0 and operations > 150
  assert Checkpoints(str(tmp_path / "0.0")).latest_step() == 4
  return tmp_path, operations


def check_saved(folder, expected):
  """The newest step is one of those expected, it is bit for bit what was saved, and the next run resumes from it."""
  checkpoints = Checkpoints(str(folder), kept=1)
  step = checkpoints.latest_step()
  assert step in expected, folder
  small_run.assert_same(checkpoints.restore(step, SHAPES), small_run.noise(SHAPES, step))
  checkpoints.save(6, small_run.noise(SHAPES, 6), RECORD)
  checkpoints.close()
  left = [name for name in os.listdir(folder / "checkpoints") if not name.endswith("set_aside")]
  assert left == ["6"] and os.listdir(folder) == ["checkpoints"], (left, os.listdir(folder))


def kill_saves(request, library, saving, count):
  folder, operations = saving
  outcomes = children(library, "save", folder, numbers := chosen(request, operations, count))
  # The number of operations differs a little between runs, so that the last ones may not be reached.
  assert all(outcomes[number][0] == -9 for number in numbers if number < operations - 20)
  for number in numbers:
    check_saved(folder / f"0.{number}", [4] if outcomes[number][0] == 0 else [2, 4])


@pytest.mark.slow
def test_F1_F2_a_save_that_is_killed_at_a_file_operation_costs_at_most_itself(request, library, saving):
  kill_saves(request, library, saving, 6)


@pytest.mark.every_operation
def test_F1_F2_a_save_that_is_killed_at_any_file_operation_costs_at_most_itself(request, library, saving):
  kill_saves(request, library, saving, 0)


def spoil_saves(request, library, saving, error, count):
  folder, operations = saving
  outcomes = children(library, "save", folder, numbers := chosen(request, operations, count), error)
  for number in numbers:
    code, _ = outcomes[number]
    assert code in (0, 3), number
    check_saved(folder / f"{error}.{number}", [4] if code == 0 else [2])


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_F7_a_save_with_an_error_at_a_file_operation_is_told_or_complete(request, library, saving, error):
  spoil_saves(request, library, saving, error, 4)


@pytest.mark.every_operation
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_F7_a_save_with_an_error_at_any_file_operation_is_told_or_complete(request, library, saving, error):
  spoil_saves(request, library, saving, error, 0)


@pytest.fixture(scope="module")
def growing(library, tmp_path_factory):
  """(folder for children that grow a run, number of their file operations, the grown state)."""
  tmp_path = tmp_path_factory.mktemp("growing")
  source = tmp_path / "source"
  prepare(tmp_path, source, 4)
  data.save_tokenizer(data.open_tokenizer("bytes"), source / "tokenizer.json")
  (source / "config.json").write_text(json.dumps(CONFIG.to_dict()))
  (tmp_path / "start").mkdir()
  ((code, operations),) = children(library, "grow", tmp_path, [0]).values()
  assert code == 0 and operations > 150
  return tmp_path, operations, state(tmp_path / "0.0" / "grown")


def state(workdir):
  shapes = make_program(CONFIG, GROWN, small_run.mesh()).shapes
  return leaves_by_path(Checkpoints(str(workdir)).restore(4, shapes))


def kill_growths(request, library, growing, count):
  folder, operations, grown = growing
  source = small_run.folder_digest(folder / "source")
  outcomes = children(library, "grow", folder, numbers := chosen(request, operations, count))
  assert small_run.folder_digest(folder / "source") == source
  for number in numbers:
    target = folder / f"0.{number}" / "grown"
    if target.exists():  # It was killed after its last rename.
      small_run.assert_same(state(target), grown)
      continue
    assert outcomes[number][0] == -9
    grow_run(str(folder / "source"), str(target), ffn_tokens=32)
    small_run.assert_same(state(target), grown)
    assert os.listdir(target.parent) == ["grown"]


@pytest.mark.slow
def test_F13_a_growth_that_is_killed_at_a_file_operation_leaves_no_target_and_can_be_done_again(
  request, library, growing
):
  kill_growths(request, library, growing, 2)


@pytest.mark.every_operation
def test_F13_a_growth_that_is_killed_at_any_file_operation_leaves_no_target_and_can_be_done_again(
  request, library, growing
):
  kill_growths(request, library, growing, 0)
