"""F18, F19, F21, F28: data that changes or cannot be read, other data on resume, ids and settings out of range."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_run
from tests.commands import call
from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig
from tokenformer_jax.data.fingerprint import check_same
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.loss import loss_sums


@pytest.fixture
def tokens(tmp_path):
  """A bare file of ids, and a configuration that reads it."""
  path = tmp_path / "ids.bin"
  np.random.default_rng(0).integers(0, 250, 40_000).astype(np.uint16).tofile(path)
  return path, DataConfig(source=f"tokens:{path}#uint16", batch_size=4)


@pytest.mark.parametrize("how", ["truncated", "emptied", "rewritten", "removed"])
def test_f18_a_token_file_that_changes_under_a_running_job_is_an_error_that_names_it(tokens, how):
  path, config = tokens
  batches = data.open_data(config, seq_length=16).train_batches()
  next(batches)
  if how == "truncated":
    os.truncate(path, 1000)
  elif how == "emptied":
    os.truncate(path, 0)
  elif how == "rewritten":
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(1, 1))  # A file system's clock may be too coarse to tell.
  else:
    path.unlink()
  with pytest.raises(ValueError, match="ids.bin (was changed or truncated|can no longer be read)"):
    for _ in range(50):  # Some batches were read ahead.
      next(batches)


@pytest.mark.parametrize(
  "line, message",
  [
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"n": ' + b"9" * 10_000 + b', "text": "x"}', "an integer of more than"),
    (b'{"text": "cut', "is not JSON"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b'{"other": 1}', "no field 'text'"),
    (b'{"text": 7}', "is a int, not text"),
    (b"[1]", "no field 'text'"),
  ],
)
def test_f18_a_bad_line_is_named_or_counted(tmp_path, line, message):
  path = tmp_path / "texts.jsonl"
  good = [b'{"text": "%s"}' % (b"word %d " % number * 30) for number in range(40)]
  path.write_bytes(b"\n".join([*good[:20], line, *good[20:]]) + b"\n")
  config = DataConfig(source=f"jsonl:{path}#text", batch_size=2)
  with pytest.raises(ValueError, match=message) as error:
    data.open_data(config, seq_length=16)
  assert f"{path} line 21" in str(error.value) and "\n" not in str(error.value)
  opened = data.open_data(dataclasses.replace(config, bad_text="skip"), seq_length=16)
  identity = opened.fingerprint["source"][0]
  assert identity["skipped"] == 1 and identity["documents"] == 40


@pytest.mark.parametrize(
  "change",
  [dict(seed=1), dict(batch_size=8), dict(packing="documents"), dict(held_out_fraction=0.2)],
)
def test_f19_other_order_or_rows_are_refused_by_the_fingerprint(tmp_path, change):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = DataConfig(source=f"text:{tmp_path}/text.txt", batch_size=4)
  begun = data.open_data(config, seq_length=16).fingerprint
  check_same(begun, data.open_data(config, seq_length=16).fingerprint)
  with pytest.raises(ValueError, match=rf"data\.({next(iter(change))}|held_out)"):
    check_same(begun, data.open_data(dataclasses.replace(config, **change), seq_length=16).fingerprint)


@pytest.mark.parametrize("position", [0, 1, 20_000, 39_999])
def test_f19_one_changed_id_is_another_fingerprint(tokens, position):
  path, config = tokens
  before = data.open_data(config, seq_length=16).fingerprint
  ids = np.fromfile(path, np.uint16)
  ids[position] ^= 1
  ids.tofile(path)
  with pytest.raises(ValueError, match="sha256"):
    check_same(before, data.open_data(config, seq_length=16).fingerprint)


@pytest.mark.parametrize("dtype, bad", [(np.uint16, 60_000), (np.int32, -1), (np.int64, 2**40)])
def test_f21_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path, dtype, bad):
  ids = np.arange(5000, dtype=dtype) % 250
  ids[4321] = bad
  path = tmp_path / "ids.bin"
  ids.tofile(path)
  config = DataConfig(source=f"tokens:{path}#{np.dtype(dtype)}", batch_size=2)
  with pytest.raises(ValueError, match=f"token id {bad} at position 4321 is not one of the tokenizer's 257"):
    data.open_data(config, seq_length=16)


@pytest.mark.parametrize(
  "section, field",
  [
    ("optimizer", "learning_rate"),
    ("optimizer", "weight_decay"),
    ("model", "rotary_base"),
    ("growth", "value_scale"),
    ("training", "spike_factor"),
    ("training", "step_timeout"),
  ],
)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_f28_numbers_that_are_not_finite_are_refused(section, field, value):
  fields = small_run.config().to_dict()
  fields[section] = {**fields[section], field: value}
  with pytest.raises(ValueError, match=f"config.{section}: {field}={value}: must be a finite number"):
    Config.from_dict(fields)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("spike_factor", 1.0, "must be above 1, or 0 for none"),
    ("spike_factor", -2.0, "must be above 1, or 0 for none"),
    ("step_timeout", -1.0, "0 waits for ever"),
    ("max_skips_in_a_row", 0, "must be at least 1"),
  ],
)
def test_f28_settings_of_reliability_out_of_range_are_refused(field, value, message):
  with pytest.raises(ValueError, match=f"{field}={value}: {message}|{field}={value}: must be in .* {message}"):
    small_run.config(**{field: value})


@pytest.mark.parametrize("workdir", ["", " "])
def test_f28_an_empty_work_folder_is_refused(workdir):
  with pytest.raises(ValueError, match="workdir=.*the path is empty"):
    user_path(workdir, "workdir")
  code, _, errors = call("train", f"--workdir={workdir}")
  assert code == 2 and len(errors) == 1 and "the path is empty" in errors[0]


def test_f21_a_label_outside_the_vocabulary_counts_as_one_with_logit_0():
  """docs/reliability.md says so: labels on a device are not checked."""
  hidden, table = jnp.ones((1, 1, 2)), jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
  nats, _ = loss_sums(hidden, table, jnp.array([[-1]]))
  np.testing.assert_allclose(nats, np.log(np.exp([1.0, 2.0, 3.0]).sum()), rtol=1e-6)
