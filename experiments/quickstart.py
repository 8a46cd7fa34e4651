"""Trains a TokenFormer on this machine's Python sources, grows it during the run, and lets it write.

    python experiments/quickstart.py
    python experiments/quickstart.py --short             # a much smaller run, for CI

The same run through the CLI, where any field can be changed:

    python -m tokenformer_jax.cli.train --config=experiments/quickstart.py --workdir=runs/quickstart

Python 3.11.7's sources, jax 0.10.2, two CPU cores, November 2026: 6 minutes of CPU time. Held-out loss 2.0570 before
the growth at step 300 and 2.0570 after it, 1.662 nats a byte at the end; on the same bytes a trigram model has 1.834, a
bigram model 2.454. (With growth by `exact`, the earlier default, it ended at 1.692.)
"""

import numpy as np
from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config import (
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)

VOCAB = 384  # 256 bytes and the end of a document, padded to a multiple of 128


def get_config(variant: str = ""):
  variants = {"": _full, "short": _short}
  if variant not in variants:
    raise ValueError(f"the variant {variant!r} is unknown: choose 'short', or leave it out for the full run.")
  return variants[variant]().to_config_dict()


def _full() -> Config:
  return Config(
    model=ModelConfig.named("mini", vocab_size=VOCAB),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=200),
    growth=GrowthConfig(stages=(GrowthStage(step=300, qkv_tokens=256, proj_tokens=256, ffn_tokens=1024),)),
    training=TrainingConfig(num_steps=600, eval_every=50, eval_batches=10, checkpoint_every=100),
  )


def _short() -> Config:
  return Config(
    model=ModelConfig.named("tiny", vocab_size=VOCAB),
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig(learning_rate=4e-3, min_learning_rate=0.0, warmup_steps=10, decay_steps=30),
    growth=GrowthConfig(
      stages=(GrowthStage(step=60, qkv_tokens=128, proj_tokens=128, ffn_tokens=512),), warmup_steps=20
    ),
    training=TrainingConfig(num_steps=120, eval_every=20, eval_batches=4, checkpoint_every=60, sample_tokens=40),
  )


def main(argv):
  del argv
  import tokenformer_jax as tf
  from tokenformer_jax import data
  from tokenformer_jax.training.run_log import read_metrics

  workdir, short = flags.FLAGS.workdir, flags.FLAGS.short
  config = _short() if short else _full()
  loss = tf.train(config, workdir)

  corpus = data.open_data(config.data, seq_length=config.model.seq_length)
  batches = list(corpus.held_out_batches(config.training.eval_batches))
  print("\nNats a byte on the same held-out bytes (lower is better):")
  baselines = ngram_losses(corpus.train_tokens(), batches, corpus.tokenizer.vocab_size)
  for name, value in (*zip(("unigram", "bigram", "trigram"), baselines), ("TokenFormer", loss)):
    print(f"  {name:12} {value:.3f}")

  growth = next(row for row in read_metrics(workdir) if "growth/parameters" in row)
  before, after = growth["growth/loss_before"], growth["growth/loss_after"]
  print(f"\nHeld-out loss at the growth, step {growth['step']}: {before:.6f} before growth, {after:.6f} after.")

  prompt = "def "
  model, tokenizer = tf.load(workdir), tf.load_tokenizer(workdir)
  (text,) = tf.generate(model, tokenizer, prompt, max_new_tokens=config.model.seq_length - len(prompt), temperature=0.7)
  print(f"\n{prompt}{text}")

  if abs(after - before) > 1e-5:
    raise SystemExit("growth changed the held-out loss by more than 1e-5")
  if loss > baselines[0 if short else 2]:
    raise SystemExit(f"the model does not beat the {'unigram' if short else 'trigram'} model")


def ngram_losses(tokens: np.ndarray, batches, vocab_size: int) -> list[float]:
  """Returns the mean −log p, in nats, of the labels of `batches` under the uni-, bi- and trigram models of `tokens`.

  Witten–Bell smoothing mixes each order with the next lower one, weighted by the number of different successors of
  its context.

  Args:
    tokens: [n] training ids.
    batches: held-out batches of ids [B, T]; a row's first label has a context of one id.
  """
  tokens = tokens.astype(np.int64)
  inputs, labels = (
    np.concatenate([getattr(batch, name) for batch in batches]).astype(np.int64) for name in ("inputs", "labels")
  )
  rows = np.concatenate([inputs[:, :1], labels], axis=1)
  probability = np.full(labels.shape, 1.0 / vocab_size)
  losses = []
  for size in range(3):
    counts = np.bincount(
      _contexts(tokens, size, vocab_size) * vocab_size + tokens[size:], minlength=vocab_size ** (size + 1)
    ).reshape(-1, vocab_size)
    total, different = counts.sum(axis=1), np.count_nonzero(counts, axis=1)
    first = max(size, 1)  # The first id with a context of this length; nothing predicts the first id of a row.
    at = _contexts(rows, size, vocab_size)[:, first - size :]
    lower = probability[:, first - 1 :]
    mixed = (counts[at, rows[:, first:]] + different[at] * lower) / np.maximum(total[at] + different[at], 1)
    probability[:, first - 1 :] = np.where(total[at] > 0, mixed, lower)
    losses.append(float(-np.log(probability).mean()))
  return losses


def _contexts(ids: np.ndarray, size: int, vocab_size: int) -> np.ndarray:
  """Returns the `size` ids before each of `ids[..., size:]` as one number."""
  code = np.zeros_like(ids[..., size:])
  for i in range(size):
    code = code * vocab_size + ids[..., i : ids.shape[-1] - size + i]
  return code


if __name__ == "__main__":  # Here and not above, because the train CLI reads this file too and has flags of its own.
  flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the run; the same command resumes it.")
  flags.DEFINE_bool("short", False, "A much smaller run.")
  command.run(main)
