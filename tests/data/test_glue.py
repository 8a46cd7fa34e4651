"""GLUE's files as examples, and texts with classes as rows and batches."""

import dataclasses

import numpy as np
import pytest

from tokenformer_jax.config import Config, DataConfig, ModelConfig
from tokenformer_jax.config.task import ClassifierConfig
from tokenformer_jax.data import byte_level_bpe, catalogues, open_run_data
from tokenformer_jax.data.glue import TASKS, Example, GlueSplit, read_glue, task_name
from tokenformer_jax.data.text_classes import TextPairs
from tokenformer_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer

# A file of each task: its name, its lines, its examples.
FILES = {
  "CoLA/train": ('a\t1\t\tHe went.\nb\t0\t*\tWent he "so.\n', [(("He went.",), 1), (('Went he "so.',), 0)]),
  "SST-2/dev": ("sentence\tlabel\nfine \t1\n", [(("fine ",), 1)]),
  "MRPC/dev": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tx\ty\r\n", [(("x", "y"), 0)]),
  "QQP/dev": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tx?\ty?\t1\n", [(("x?", "y?"), 1)]),
  "STS-B/dev": ("index\tsentence1\tsentence2\tscore\n0\tx\ty\t4.750\n", [(("x", "y"), 4.75)]),
  "MNLI/dev_matched": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tx\ty\t-\tneutral\n", [(("x", "y"), 1)]),
  "QNLI/dev": ("index\tquestion\tsentence\tlabel\n0\tx\ty\tnot_entailment\n", [(("x", "y"), 1)]),
  "RTE/train": (
    "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tentailment\n1\tz\tu\tentailment",
    [(("x", "y"), 0), (("z", "u"), 0)],
  ),
  "WNLI/dev": ("index\tsentence1\tsentence2\tlabel\n0\tx\ty\t1\n", [(("x", "y"), 1)]),
}


def written(folder, name, text):
  path = folder / f"{name}.tsv"
  path.parent.mkdir(exist_ok=True)
  path.write_text(text, encoding="utf-8", newline="")
  return f"glue:{path.parent}", path.stem


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_every_task_become_examples(name, tmp_path):
  text, expected = FILES[name]
  split = read_glue(*written(tmp_path, name, text))
  assert [tuple(example) for example in split.examples] == expected
  assert TASKS[split.task].folder == name.split("/")[0]


RTE = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("RTE/train", "index\tsentence1\tlabel\n0\tx\tentailment\n", "RTE/train.tsv, line 1: RTE needs a column 'sentence2'; there are 'index'"),
    ("RTE/train", RTE + "0\tx\ty\tentailment\n1\tx\ty\n", "RTE/train.tsv, line 3: 3 columns, of the 4"),
    ("RTE/train", RTE + "0\tx\ty\tmaybe\n", "RTE/train.tsv, line 2: label='maybe' is no label of RTE: expected one of entail"),
    ("STS-B/train", "sentence1\tsentence2\tscore\nx\ty\t5.5\n", "line 2: score='5.5' is no label of STS-B: expected a number from 0 to 5"),
    ("CoLA/train", "gj04\t1\n", "CoLA/train.tsv, line 1: 2 columns, of the 4"),
    ("RTE/train", RTE, "RTE@train holds no examples"),
    ("ROTE/train", RTE, "GLUE has no task 'ROTE': choose one of cola, .*. Did you mean 'rte'?"),
  ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line_with_path_and_number(name, text, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    read_glue(*written(tmp_path, name, text))


def test_bad_lines_can_be_left_out(tmp_path):
  source, split = written(tmp_path, "RTE/train", RTE + "0\tx\ty\tmaybe\n1\tx\ty\n2\ta\tb\tentailment\n")
  assert read_glue(source, split, "skip").examples == [Example(("a", "b"), 0.0)]


def test_records_of_tensorflow_datasets_become_the_same_examples(monkeypatch):
  asked = []
  records = [{"premise": b"x", "hypothesis": "é".encode(), "label": 2}]
  monkeypatch.setattr("tokenformer_jax.data.glue.tfds_builder", lambda name, spec: (None, asked.append(name)))
  monkeypatch.setattr(
    "tokenformer_jax.data.glue.tfds_records", lambda builder, split, spec: asked.append(split) or records
  )
  assert read_glue("tfds:glue/mnli", "dev_mismatched").examples == [Example(("x", "é"), 2.0)]
  assert asked == ["glue/mnli", "validation_mismatched"] and task_name("STS-B") == "stsb"
  assert catalogues.tfds_builder is not None


def rows(texts, tokenizer, length, task="rte"):
  packer = TextPairs(GlueSplit(task, "here", [Example(texts, 1.0)], {}), tokenizer, length)
  return packer.row(0), packer


def test_a_pair_is_cut_from_its_longer_text_and_has_types():
  row, packer = rows(("abcdefgh", "xyz"), ByteTokenizer(), 12)
  cls, sep = 0xFE, 256
  # Twelve places hold nine ids beside [CLS] and two [SEP].
  assert row.inputs.tolist() == [cls, *b"abcdef", sep, *b"xyz", sep]
  assert row.types.tolist() == [0] * 8 + [1] * 4 and row.segments.tolist() == [1] * 12
  row, _ = rows(("ab", "c"), ByteTokenizer(), 8)
  assert row.inputs.tolist() == [cls, *b"ab", sep, *b"c", sep, sep, sep] and row.segments.tolist() == [1] * 6 + [0] * 2
  row, _ = rows(("xyz", "abcdefgh"), ByteTokenizer(), 12)
  assert row.inputs.tolist() == [cls, *b"xyz", sep, *b"abcdef", sep]
  assert packer.row(1).weights == 0 and packer.row(0).weights == 1


def test_special_tokens_are_the_tokenizer_s_own():
  description = byte_level_bpe.describe_bytes()
  names = ["[CLS]", "[SEP]"]
  description["added_tokens"] += [
    {**description["added_tokens"][0], "id": 257 + i, "content": name} for i, name in enumerate(names)
  ]
  tokenizer = HuggingFaceTokenizer(description, "<|endoftext|>")
  row, _ = rows(("a",), tokenizer, 4, task="cola")
  assert row.inputs[[0, 2]].tolist() == [257, 258]


def test_held_out_batches_have_every_example_once_and_shares_are_of_one_batch(tmp_path):
  lines = "".join(f"{i}\tx{i}\ty\t{'not_' * (i % 2)}entailment\n" for i in range(7))
  source, _ = written(tmp_path, "RTE/train", RTE + lines)
  written(tmp_path, "RTE/dev", RTE + lines)
  model = ModelConfig(
    **dict(vocab_size=264, num_layers=1, hidden_size=8, num_heads=1, qkv_tokens=8, proj_tokens=8, ffn_tokens=8),
    seq_length=16,
    task="classify",
    classifier=ClassifierConfig(num_classes=2),
  )
  config = Config(model=model, data=DataConfig(source=source, batch_size=4))
  opened = open_run_data(config)
  (batches,) = map(list, opened.named_held_out_batches().values())
  assert [batch.weights.tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 0]]
  assert np.concatenate([batch.labels for batch in batches])[:7].tolist() == [0, 1, 0, 1, 0, 1, 0]
  whole = next(opened.train_batches())
  halves = [next(open_run_data(config, process_index=i, process_count=2).train_batches()) for i in range(2)]
  assert np.array_equal(np.concatenate([half.inputs for half in halves]), whole.inputs)
  assert opened.report["train"] == [{"source": f"{source}@train", "examples": 7}]
  wrong = dataclasses.replace(model, classifier=ClassifierConfig(num_classes=3))
  with pytest.raises(ValueError, match="classifier.num_classes=3: RTE has 2 classes; choose 2"):
    open_run_data(dataclasses.replace(config, model=wrong))
