import copy
import json
import types

import pytest

from tokenformer_jax.data import fingerprint
from tokenformer_jax.data.fingerprint import check_same, hash_file

STORED = dict(
  source=[dict(kind="text", weight=1.0, sha256="aa"), dict(kind="jsonl", weight=2.0, sha256="bb")],
  held_out={"fraction": 0.05},
  seq_length=128,
  seed=0,
)


def changed(path, value):
  other = copy.deepcopy(STORED)
  place = other
  for step in path[:-1]:
    place = place[step]
  place[path[-1]] = value
  return other


def test_a_fingerprint_equals_itself_after_storage():
  check_same(STORED, json.loads(json.dumps(STORED)))
  check_same(dict(a=(1, 2)), dict(a=[1, 2]))


@pytest.mark.parametrize(
  "path, value, words",
  [
    (["seed"], 1, "data.seed was 0 when this run began and is 1 now"),
    (["source", 1, "sha256"], "cc", r"data.source\[1\].sha256 was 'bb'.*is 'cc'"),
    (["source"], STORED["source"][:1], r"data.source was \["),
    (["held_out"], {"source": []}, "data.held_out.fraction was 0.05 .* is None"),
    (["new"], 1, "data.new was None .* is 1"),
  ],
)
def test_the_first_difference_is_named_with_both_values(path, value, words):
  with pytest.raises(ValueError, match=words + ".*--allow_data_change"):
    check_same(STORED, changed(path, value))


def test_another_tokenizer_is_named_with_its_way_out_and_an_old_form_of_the_same_is_accepted():
  tokenizer = types.SimpleNamespace(matches=lambda fingerprint: fingerprint in ("new form", "old form"))
  now = {**STORED, "tokenizer": "new form"}
  check_same({**STORED, "tokenizer": "old form"}, now, tokenizer)
  for given in (tokenizer, None):
    with pytest.raises(ValueError, match="data.tokenizer was 'other' .* is 'new form' now: set data.tokenizer to the"):
      check_same({**STORED, "tokenizer": "other"}, now, given)


def test_long_values_are_shortened_in_the_message():
  with pytest.raises(ValueError) as error:
    check_same({"source": []}, {"source": [{"sha256": "ab"}] * 100})
  assert len(str(error.value)) < 500


def test_files_differ_by_length_and_by_any_byte_of_a_small_one(tmp_path):
  contents = [b"", b"\0", b"\0" * 1000, b"\0" * 999 + b"\1"]
  for i, content in enumerate(contents):
    (tmp_path / str(i)).write_bytes(content)
  assert len({hash_file(tmp_path / str(i)) for i in range(4)}) == 4
  (tmp_path / "again").write_bytes(contents[2])
  assert hash_file(tmp_path / "again") == hash_file(tmp_path / "2")


def test_large_files_are_hashed_in_evenly_spread_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprint, "WHOLE", 40)
  monkeypatch.setattr(fingerprint, "BLOCK", 10)
  raw = bytearray(100)
  hashes = []
  for at in (None, 0, 99, 35, 15):
    path = tmp_path / "file"
    path.write_bytes(bytes(raw[:at] + b"\1" + raw[at + 1 :] if at is not None else raw))
    hashes.append(hash_file(path))
  assert len(set(hashes[:4])) == 4  # First, last and a middle block.
  assert hashes[4] == hashes[0]  # A byte between the blocks is not seen.
  (tmp_path / "file").write_bytes(bytes(101))
  assert hash_file(tmp_path / "file") != hashes[0]
