"""Runs of masked language modelling: masks, the loss of few places, growth in the middle, and resuming."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tests import small_run
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.task import ClassifierConfig
from tokenformer_jax.data.masking import Masking, mask_id
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.evaluation.evaluate import evaluate
from tokenformer_jax.evaluation.glue import METRICS, glue_metrics, glue_score
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import Checkpoints, load
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.objective import class_logits, measures, objective_of, summed
from tokenformer_jax.training.run_log import read_metrics

# One layer of matrices compiles fast; hidden units grow as parameter tokens do.
MODEL = ModelConfig.named(
  "tiny", "bert", vocab_size=264, num_layers=1, hidden_size=16, num_heads=2, ffn_tokens=16, seq_length=16
)
GROWN = MODEL.grown(ffn_tokens=32)
GROWTH_STEP, STEPS = 1, 3


def config(text, **changes):
  """A run with a growth in its middle."""
  run = small_run.config(f"text:{text}")
  growth = dataclasses.replace(run.growth, stages=(small_run.stage(GROWTH_STEP, GROWN),))
  training = dict(num_steps=STEPS, log_every=1, eval_every=1, checkpoint_every=1, checkpoints_kept=9)
  return small_run.replace(dataclasses.replace(run, model=MODEL, growth=growth), training=training, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text(small_run.TEXT)
  return path


def measured(workdir):
  rows = read_metrics(str(workdir))
  return [{k: v for k, v in row.items() if k not in ("train/tokens_per_second", "train/utilisation")} for row in rows]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
  """The work folder of a whole run, and what `train` returned."""
  workdir = tmp_path_factory.mktemp("runs") / "masked"
  return workdir, train(config(text), str(workdir))


@pytest.mark.slow
def test_a_run_grows_and_after_a_kill_gives_what_it_gave_before(run, text, tmp_path):
  folder, loss = run
  rows = measured(folder)
  (seam,) = [row for row in rows if "growth/parameters" in row]
  assert abs(seam["growth/loss_before"] - seam["growth/loss_after"]) <= 1e-5
  assert [row["held_out/loss"] for row in rows if "held_out/loss" in row][-1] == loss
  assert not any("held_out/perplexity" in row for row in rows)
  # The loss is that of the masked tokens of the held-out text, whose masks are the same each time.
  graphdef, *leaves = split(load(str(folder)))
  scores_of = jax.jit(lambda leaves, ids: jax.nn.log_softmax(nnx.merge(graphdef, *leaves)(ids)))
  (batches,) = data.open_run_data(config(text)).named_held_out_batches(2).values()
  nats, hidden_ids = [], 0
  for batch in batches:
    scores = np.asarray(scores_of(leaves, batch.inputs), np.float64)
    of_places = np.take_along_axis(scores, batch.places[..., None].astype(int), axis=1)
    nats.append(-np.take_along_axis(of_places, batch.labels[..., None], axis=2))
    hidden_ids += np.sum(np.take_along_axis(batch.inputs, batch.places, axis=1) == 255)
  np.testing.assert_allclose(np.mean(nats), loss, rtol=1e-5)
  assert nats[0].shape == (8, 4, 1) and hidden_ids == 2 * 8 * 3

  # A run that lost its newest checkpoint repeats what came after the one before.
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
  assert Checkpoints(str(tmp_path / "run")).latest_step() == STEPS - 1 > GROWTH_STEP
  assert train(config(text), str(tmp_path / "run")) == loss
  assert measured(tmp_path / "run") == rows


@pytest.mark.slow
def test_a_pretrained_encoder_is_fine_tuned_with_a_fresh_head(run, tmp_path, capfd):
  folder, _ = run
  glue = tmp_path / "glue" / "RTE"
  glue.mkdir(parents=True)
  lines = "".join(f"{i}\tit is {i}\tso\t{'not_' * (i % 3 > 0)}entailment\n" for i in range(11))
  for name in ("train", "dev"):
    (glue / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + lines)
  model = dataclasses.replace(GROWN, task="classify", classifier=ClassifierConfig(num_classes=2))
  tuned = dataclasses.replace(small_run.config(num_steps=1, log_every=1), model=model, init_from=str(folder))
  tuned = small_run.replace(
    tuned, data=dict(source=f"glue:{glue}"), optimizer=dict(learning_rate=1e-9, min_learning_rate=0.0)
  )
  loss = train(tuned, str(tmp_path / "rte"))
  said = capfd.readouterr().out
  assert (
    f"init_from={folder}: " in said and "fresh ones: classes/bias, classes/weight, pooler/bias, pooler/weig" in said
  )
  before, after = (load(str(path)) for path in (folder, tmp_path / "rte"))
  # The rate is so small that the weights are still those of the encoder.
  small_run.assert_close(after.blocks.ffn.keys[...], before.blocks.ffn.keys[...], 1e-6)
  small_run.assert_close(after.embedding[...], before.embedding[...], 1e-6)
  rows = read_metrics(str(tmp_path / "rte"))
  # Evaluation in the run and on its own see the same eleven examples.
  found = evaluate(after, data.open_tokenizer("bytes"), tasks="rte", data_folder=tmp_path, progress=False)
  assert found["rte"] == {"acc": rows[-1]["held_out/accuracy"], "examples": 11} and rows[-1]["held_out/loss"] == loss
  with pytest.raises(ValueError, match="classifier.num_classes=2: stsb needs 1; give a run of that task"):
    (tmp_path / "glue" / "STS-B").mkdir()
    (tmp_path / "glue" / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1.0\n")
    evaluate(after, data.open_tokenizer("bytes"), tasks="stsb", data_folder=tmp_path)


def test_metrics_of_glue_and_their_mean():
  """Against formulas written out: F1 = 2 TP / (2 TP + FP + FN), and Matthews' coefficient of the same table."""
  labels, classes = np.array([1, 1, 0, 0, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 0, 1])
  outputs = np.eye(2)[classes]
  tp, tn, fp, fn = 3, 3, 1, 1
  assert glue_metrics("mrpc", outputs, labels) == pytest.approx({"f1": 2 * tp / (2 * tp + fp + fn), "acc": 6 / 8})
  mcc = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert glue_metrics("cola", outputs, labels) == pytest.approx({"mcc": mcc})
  numbers, scores = np.array([[0.1], [0.5], [3.0], [2.0]]), np.array([0.0, 1.0, 5.0, 2.0])
  expected = np.corrcoef(numbers[:, 0], scores)[0, 1]
  assert glue_metrics("stsb", numbers, scores) == pytest.approx({"pearson": expected, "spearman": 1.0})
  assert glue_metrics("stsb", np.ones((4, 1)), scores) == {"pearson": 0.0, "spearman": 0.0}
  results = {task: {METRICS[task][0]: 0.5} for task in METRICS if task != "wnli"}
  assert glue_score(results) is None
  results["mnli"]["acc_mismatched"] = 0.95
  assert glue_score(results) == pytest.approx((8 * 0.5 + 0.95) / 9)


def test_masks_have_exact_shares_and_depend_on_seed_and_sample_alone():
  row = data.Batch(np.arange(1000, 1100, dtype=np.int32), np.zeros(100, np.int32))
  masking = Masking(0.25, mask_id=7, vocab_size=5, seed=0)
  masked = masking(row, 3)
  assert np.array_equal(masked.labels, row.inputs[masked.places]) and len(set(masked.places)) == 25
  at_places = masked.inputs[masked.places]
  # 20 masks, 2 random ids (round(2.5) = 2), 3 as they were.
  assert [np.sum(at_places == 7), np.sum(at_places < 5), np.sum(at_places == masked.labels)] == [20, 2, 3]
  others = np.setdiff1d(np.arange(100), masked.places)
  assert np.array_equal(masked.inputs[others], row.inputs[others])
  same = masking(row, 3)
  assert np.array_equal(same.inputs, masked.inputs) and np.array_equal(same.places, masked.places)
  for other in (masking(row, 4), dataclasses.replace(masking, seed=1)(row, 3)):
    assert not np.array_equal(other.places, masked.places)
  # Every position is chosen as often as any other.
  counts = np.bincount(np.concatenate([masking(row, n).places for n in range(2000)]), minlength=100)
  assert abs(counts / 500 - 1).max() < 0.2


def test_padding_is_never_masked_and_short_texts_have_fewer_places():
  segments = np.repeat(np.array([1, 2, 0], np.int32), (6, 4, 10))
  row = data.Batch(np.arange(20, dtype=np.int32), np.zeros(20, np.int32), segments=segments)
  masked = Masking(0.4, mask_id=99, vocab_size=5, seed=0)(row, 0)
  assert masked.weights.tolist() == [1] * 4 + [0] * 4 and masked.places[:4].max() < 10
  assert np.array_equal(masked.inputs[10:], row.inputs[10:])


def test_the_mask_is_a_token_of_the_vocabulary():
  assert mask_id(ByteTokenizer(), "", "bytes") == 0xFF and mask_id(ByteTokenizer(), "<0xFE>", "bytes") == 0xFE
  with pytest.raises(ValueError, match="data.tokenizer='bytes' has no token '<m>' to mask with: name a token"):
    mask_id(ByteTokenizer(), "<m>", "bytes")


def test_losses_of_classes_shares_and_numbers():
  """Against NumPy in float64; rows of weight 0 count in nothing."""
  rng = np.random.default_rng(0)
  logits, shares = rng.normal(size=(4, 3)).astype(np.float32), rng.dirichlet(np.ones(3), 4).astype(np.float32)
  labels, weights = np.array([2, 0, 1, 1], np.int32), np.array([1, 1, 0.5, 0], np.float32)
  logits[2:, 1] += 5.0  # The rows of little weight are right.
  shares[2:] = 0.1, 0.8, 0.1
  log_p = np.float64(logits) - np.log(np.sum(np.exp(np.float64(logits)), axis=1, keepdims=True))

  class Model:
    config = MODEL

    def hidden(self, inputs, **kwargs):
      return inputs, {}

    def logits(self, hidden):
      return hidden

  model = dataclasses.replace(MODEL, task="classify", classifier=ClassifierConfig(num_classes=3))
  for targets, expected, best in (
    (labels, -log_p[np.arange(4), labels], labels),
    (shares, -np.sum(shares * log_p, axis=1), shares.argmax(axis=1)),
  ):
    batch = data.ClassBatch(logits, targets, weights=weights)
    sums = jax.jit(lambda batch: objective_of(model).loss(Model(), batch, 0.0, True)[1])(batch)
    found = measures(model, summed([sums, sums]))
    np.testing.assert_allclose(found["loss"], np.average(expected, weights=weights), rtol=1e-6)
    assert found["accuracy"] == np.average(logits.argmax(axis=1) == best, weights=weights)
  regression = dataclasses.replace(model, classifier=ClassifierConfig(num_classes=1))
  batch = data.ClassBatch(logits[:, :1], shares[:, 0], weights=weights)
  sums = jax.jit(lambda batch: objective_of(regression).loss(Model(), batch, 0.0, True)[1])(batch)
  expected = np.average((logits[:, 0] - shares[:, 0]) ** 2, weights=weights)
  assert list(measures(regression, summed([sums]))) == ["loss"]
  np.testing.assert_allclose(measures(regression, summed([sums]))["loss"], expected, rtol=1e-6)


def test_types_of_tokens_reach_models_that_have_them():
  class Model:
    def __init__(self, config):
      self.config = config

    def hidden(self, inputs, *, real, training, types):
      return (real, types), {}

    def logits(self, hidden):
      return hidden

  ids, segments = np.zeros((1, 4), np.int32), np.array([[1, 1, 1, 0]], np.int32)
  batch = data.ClassBatch(ids, np.zeros(1, np.int32), segments, types=np.array([[0, 0, 1, 0]], np.int32))
  for kinds, expected in ((0, None), (2, batch.types)):
    (real, types), _ = class_logits(Model(dataclasses.replace(MODEL, token_types=kinds)), batch, training=True)
    assert real.tolist() == [[True, True, True, False]] and types is expected
