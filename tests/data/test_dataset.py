import dataclasses
import json

import numpy as np
import pytest

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import byte_level_bpe, check_same, open_data
from tokenformer_jax.data.tokenizer import ByteTokenizer

T = 8


@pytest.fixture
def texts(tmp_path):
  for i in range(60):
    (tmp_path / f"{i}.txt").write_text(f"{i} is the number of this document. " * (1 + i % 5))
  return tmp_path


def config_of(folder, **changes):
  fields = dict(source=f"text:{folder}/*.txt", batch_size=4, held_out_fraction=0.2)
  return DataConfig(**{**fields, **changes})


def equal(a, b):
  return all(x is y is None or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_is_int32_and_labels_are_inputs_one_later(texts):
  batch = next(open_data(config_of(texts), seq_length=T).train_batches())
  assert batch.inputs.shape == batch.labels.shape == (4, T)
  assert batch.inputs.dtype == batch.labels.dtype == np.int32
  assert np.array_equal(batch.inputs[:, 1:], batch.labels[:, :-1])
  assert batch.positions is batch.segments is batch.weights is None


def test_packed_documents_fill_all_columns(texts):
  batch = next(open_data(config_of(texts, packing="documents"), seq_length=T).train_batches())
  assert [column.dtype for column in batch] == [np.int32] * 4 + [np.float32]
  assert {column.shape for column in batch} == {(4, T)}


def test_an_epoch_is_every_training_window_once(texts):
  data = open_data(config_of(texts), seq_length=T)
  windows = data.report["train"][0]["windows"]
  tokens = data.train_tokens()
  assert data.report["train"][0]["dropped_tokens"] == len(tokens) - (windows * T + 1)
  iterator = data.train_batches()
  rows = np.concatenate([next(iterator).labels for _ in range(-(-windows // 4))])[:windows]
  expected = tokens[1 : windows * T + 1].reshape(windows, T)
  assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_every_document_is_either_trained_on_or_held_out(texts):
  data = open_data(config_of(texts), seq_length=T)

  def documents(tokens):
    return set(bytes(np.where(tokens == 256, 0, tokens).tolist()).decode().split("\0")[:-1])

  train, held_out = documents(data.train_tokens()), documents(data.held_out_tokens())
  assert not train & held_out and held_out
  assert train | held_out == {path.read_text() for path in texts.iterdir()}


def test_held_out_batches_are_the_same_at_every_call_and_for_every_seed(texts):
  data = open_data(config_of(texts), seq_length=T)
  everything = list(data.held_out_batches())
  assert len(everything) == data.report["held_out"][0]["windows"] // 4 > 3
  for again in (
    list(data.held_out_batches(3)),
    list(open_data(config_of(texts, seed=7), seq_length=T).held_out_batches(3)),
  ):
    assert len(again) == 3 and all(equal(a, b) for a, b in zip(again, everything))
  assert len(list(data.held_out_batches(10**6))) == len(everything)


def test_all_of_a_held_out_source_is_held_out(texts, tmp_path_factory):
  other = tmp_path_factory.mktemp("other")
  (other / "valid.txt").write_text("held out " * 20)
  data = open_data(config_of(texts, held_out_source=f"text:{other}/valid.txt"), seq_length=T)
  assert data.held_out_tokens().tolist() == [*b"held out " * 20, 256]
  assert sum(data.train_tokens() == 256) == 60


@pytest.fixture
def two_sets(tmp_path_factory):
  """Two folders of held-out text, "upper" and "digits", and the `held_out_sets` that names them."""
  folder = tmp_path_factory.mktemp("sets")
  (folder / "upper.txt").write_text("ABCDEFGH" * 20)
  (folder / "digits.txt").write_text("01234567" * 20)
  return f"upper=text:{folder}/upper.txt + digits=0.5*text:{folder}/digits.txt + 0.5*text:{folder}/upper.txt"


def test_named_held_out_sets_give_batches_of_their_own_text(texts, two_sets):
  data = open_data(config_of(texts, held_out_sets=two_sets), seq_length=T)
  named = {name: list(batches) for name, batches in data.named_held_out_batches(3).items()}
  assert list(named) == ["held_out", "upper", "digits"] and {len(batches) for batches in named.values()} == {3}
  assert all(equal(a, b) for a, b in zip(named["held_out"], data.held_out_batches(3), strict=True))
  assert bytes(named["upper"][0].inputs[0].tolist()) == b"ABCDEFGH"
  first_ids = np.concatenate([batch.inputs[:, 0] for batch in named["digits"]]).tolist()
  assert sorted(first_ids) == [ord("0")] * 6 + [ord("A")] * 6
  assert len(data.report["digits"]) == 2 and len(data.held_out_tokens("upper")) == 161
  with pytest.raises(ValueError, match="held-out set 'uper' is unknown. Did you mean 'upper'?"):
    data.held_out_tokens("uper")


def test_named_held_out_sets_change_the_fingerprint_and_not_the_training_batches(texts, two_sets):
  without, with_sets = (open_data(config_of(texts, held_out_sets=s), seq_length=T) for s in ("", two_sets))
  assert "held_out_sets" not in without.fingerprint
  with pytest.raises(ValueError, match="data.held_out_sets was None when this run began and is {'upper'"):
    check_same(without.fingerprint, json.loads(json.dumps(with_sets.fingerprint)))
  assert equal(next(without.train_batches()), next(with_sets.train_batches()))


def test_a_named_held_out_set_without_a_batch_is_refused(texts, two_sets):
  with pytest.raises(ValueError, match="text of the held-out set 'upper' fills 20 windows of 8 tokens, less than"):
    open_data(config_of(texts, held_out_sets=two_sets, batch_size=21), seq_length=T)


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_processes_share_batches_and_resume_with_another_number_of_them(packing, texts):
  config = config_of(texts, packing=packing)
  straight = open_data(config, seq_length=T).train_batches()
  for _ in range(5):
    next(straight)
  state = json.loads(json.dumps(straight.get_state()))
  expected = [next(straight) for _ in range(3)]
  processes = [open_data(config, seq_length=T, process_index=p, process_count=4) for p in range(4)]
  shares = [process.train_batches() for process in processes]
  for share in shares:
    share.set_state(state)
  for batch in expected:
    parts = [next(share) for share in shares]
    together = [None if column[0] is None else np.concatenate(column) for column in zip(*parts)]
    assert equal(together, batch)


def test_mixtures_take_from_all_sources(texts, tmp_path_factory):
  other = tmp_path_factory.mktemp("upper")
  (other / "a.txt").write_text("ABCDEFGH" * 100)
  source = f"0.75*text:{texts}/*.txt + 0.25*text:{other}/a.txt"
  data = open_data(config_of(texts, source=source), seq_length=T)
  iterator = data.train_batches()
  rows = np.concatenate([next(iterator).inputs for _ in range(100)])
  upper = ((rows >= 65) & (rows <= 90)).all(axis=1).mean()
  assert abs(upper - 0.25) < 0.01
  assert len(data.fingerprint["source"]) == len(data.report["train"]) == 2


def test_a_held_out_mixture_without_a_batch_is_refused(texts, tmp_path_factory):
  other = tmp_path_factory.mktemp("one")
  (other / "a.txt").write_text("one window")
  config = config_of(texts, held_out_source=f"text:{texts}/*.txt + 0.9*text:{other}/a.txt")
  with pytest.raises(ValueError, match="mixture of the held-out text ends after 2 windows"):
    open_data(config, seq_length=T)


def test_the_fingerprint_follows_content_and_settings_but_not_the_folder(texts, tmp_path_factory):
  def fingerprint(folder, seq_length=T, **changes):
    return json.loads(json.dumps(open_data(config_of(folder, **changes), seq_length=seq_length).fingerprint))

  before = fingerprint(texts)
  moved = tmp_path_factory.mktemp("moved")
  for path in texts.iterdir():
    (moved / path.name).write_bytes(path.read_bytes())
  check_same(before, fingerprint(moved))
  for path, now in (
    ("seed", fingerprint(texts, seed=1)),
    ("seq_length", fingerprint(texts, seq_length=9)),
    ("batch_size", fingerprint(texts, batch_size=2)),
    ("packing", fingerprint(texts, packing="documents")),
    ("held_out.fraction", fingerprint(texts, held_out_fraction=0.3)),
  ):
    with pytest.raises(ValueError, match=f"data.{path} was"):
      check_same(before, now)
  (moved / "7.txt").write_text("changed")
  with pytest.raises(ValueError, match=r"data.source\[0\].bytes was"):
    check_same(before, fingerprint(moved))


def test_a_given_tokenizer_replaces_the_configs(texts):
  data = open_data(config_of(texts, tokenizer="nowhere.json"), seq_length=T, tokenizer=ByteTokenizer())
  assert data.tokenizer.vocab_size == 257
  assert data.fingerprint["tokenizer"] == ByteTokenizer().fingerprint


def test_the_name_of_a_special_token_in_a_document_is_its_id_or_plain_text(texts, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  path.write_text(json.dumps(byte_level_bpe.train(["is the number"], 257)))
  (texts / "0.txt").write_text("before <|endoftext|> after")

  def data_of(special_tokens):
    config = config_of(texts, tokenizer=f"{path}#<|endoftext|>", special_tokens=special_tokens)
    return open_data(config, seq_length=T)

  recognised, text = data_of("recognise"), data_of("text")
  ends = [
    np.sum(np.append(d.train_tokens(), d.held_out_tokens()) == d.tokenizer.end_of_document) for d in (recognised, text)
  ]
  assert ends == [61, 60]
  assert data_of("recognise").fingerprint == recognised.fingerprint != text.fingerprint
  with pytest.raises(ValueError, match="special_tokens='split': choose one of recognise, text"):
    config_of(texts, special_tokens="split")


def test_the_default_source_is_pythons_own_library():
  data = open_data(DataConfig(), seq_length=256)
  share = len(data.held_out_tokens()) / (len(data.held_out_tokens()) + len(data.train_tokens()))
  assert 0.01 < share < 0.12 and len(data.train_tokens()) > 5_000_000
  assert data.tokenizer.padded_vocab_size == 384
  assert data.tokenizer.decode(data.train_tokens()).count("\nimport ") > 1000


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(batch_size=3), "batch_size=3 cannot be shared by 2 processes"),
    (dict(batch_size=10**4), r"training text fills \d+ windows of 8 tokens, less than one batch of 10000"),
    (dict(held_out_fraction=1e-9, batch_size=40), "the held-out text fills .* held_out_source"),
    (dict(source="text:nowhere/*"), "no file matches"),
    (dict(source="tokens:nowhere"), "there is no file .*nowhere.bin"),
    (dict(held_out_source="jsonl:nowhere"), "name the field"),
    (dict(tokenizer="./nowhere.json"), "does not exist"),
  ],
)
def test_mistakes_are_named_when_the_data_is_opened(changes, words, texts):
  with pytest.raises(ValueError, match=words):
    open_data(config_of(texts, **changes), seq_length=T, process_count=2)


def test_every_source_of_a_mixture_must_fill_a_window(texts, tmp_path_factory):
  other = tmp_path_factory.mktemp("small")
  (other / "a.txt").write_text("ab")
  with pytest.raises(ValueError, match="one source of the mixture fills none"):
    open_data(config_of(texts, source=f"text:{texts}/*.txt + text:{other}/a.txt"), seq_length=T)


def test_bad_text_is_a_choice_of_the_config(texts):
  (texts / "bad.txt").write_bytes(b"\xff is not UTF-8")
  with pytest.raises(ValueError, match="bad.txt is not UTF-8 at byte 0"):
    open_data(config_of(texts), seq_length=T)
  for choice, counts in (("replace", (1, 0, 61)), ("skip", (0, 1, 60))):
    entry = open_data(config_of(texts, bad_text=choice), seq_length=T).fingerprint["source"][0]
    assert (entry["replaced"], entry["skipped"], entry["documents"]) == counts
  with pytest.raises(ValueError, match="bad_text"):
    dataclasses.replace(config_of(texts), bad_text="ignore")
