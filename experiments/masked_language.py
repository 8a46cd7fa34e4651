"""Three encoders of equal size, pretrained on masked tokens, then fine-tuned on GLUE beside models that were not.

    export TOKENFORMER_DATA=FOLDER
    python -m experiments.masked_language --workdir=runs/masked_language             # all runs; resumes
    python -m experiments.masked_language --workdir=runs/masked_language --report    # the table of those that are done
    python -m tokenformer_jax.cli.train --config=experiments/masked_language.py:sas-p --workdir=runs/sas_p
    python -m tokenformer_jax.cli.train --config=experiments/masked_language.py:sas-p/rte --workdir=runs/rte \\
        --config.init_from=runs/sas_p

FOLDER holds english_novels and openstax_textbooks (`train.txt.gz` and `valid.txt.gz`, documents separated by lines that
are <|endoftext|>), glue (a folder of each task) and tokenizers/gpt2_tiny_5k.

`baseline` is Crammed BERT's pre-norm block, `sas-p` the simplified parallel block of arXiv 2311.01906 with C = 1 / T, and
`tokenformer` has parameter tokens in every layer. Their blocks have as many parameters as TokenFormer's, and all are
trained on the same rows with the same masks and learning rate, which rises and falls as Crammed BERT's. The mask is
`ÿ`, the byte 0xFF, which no text contains. A task is learned by each encoder from its pretrained weights and from random
ones, with the same rate in both cases; there is no dropout.

The table has not been filled yet. It takes 3 runs of 1,000 updates and 36 of 200, of models with half a million parameters.
"""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
from absl import flags

from experiments.runs import held_out_losses
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.task import ClassifierConfig
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.data.glue import TASKS
from tokenformer_jax.evaluation.evaluate import evaluate
from tokenformer_jax.evaluation.glue import METRICS
from tokenformer_jax.training.checkpoints import load, load_tokenizer
from tokenformer_jax.training.loop import train

MARKER = "<|endoftext|>"
PRESETS = {"baseline": "bert", "sas-p": "sas-p", "tokenformer": "tokenformer"}
SIZE = dict(vocab_size=5120, num_layers=3, hidden_size=64, num_heads=4, seq_length=64)
TOKENS = dict(qkv_tokens=64, proj_tokens=64, ffn_tokens=256)
PRETRAINING_STEPS, TUNING_STEPS, BATCH, SEEDS = 1000, 200, 32, (0, 1, 2)
TUNED_ON = ("sst2", "rte")


def model_of(name: str) -> ModelConfig:
  """The encoder of a preset, with about as many parameters in its blocks as TokenFormer of `TOKENS`."""
  require_choice("encoder", name, PRESETS)

  def model(rows: int) -> ModelConfig:
    return ModelConfig.named("tiny", PRESETS[name], task="masked_token", **SIZE, ffn_tokens=rows)

  if name == "tokenformer":
    return ModelConfig.named("tiny", "tokenformer", task="masked_token", **SIZE, **TOKENS)
  wanted = model_of("tokenformer").num_non_embedding_parameters
  few, more = (model(rows).num_non_embedding_parameters for rows in (64, 128))
  return model(64 + round(64 * (wanted - few) / (more - few)))


def run_config(name: str, task: str = "", seed: int = 0, init_from: str = "") -> Config:
  """The pretraining of an encoder, or its fine-tuning on a task of GLUE."""
  folder = os.environ.get("TOKENFORMER_DATA")
  if not folder:
    raise ValueError("TOKENFORMER_DATA is not set: name the folder that holds english_novels and glue.")
  shared = dict(tokenizer=f"{folder}/tokenizers/gpt2_tiny_5k", batch_size=BATCH, seed=seed)
  often = dict(seed=seed, log_every=50, checkpoint_every=500, checkpoints_kept=1, sample_tokens=0)
  if not task:

    def texts(part: str) -> str:
      return " + ".join(f"text:{folder}/{of}/{part}.txt.gz#{MARKER}" for of in ("english_novels", "openstax_textbooks"))

    return Config(
      model=model_of(name),
      data=DataConfig(source=texts("train"), held_out_source=texts("valid"), mask_token="ÿ", **shared),
      optimizer=OptimizerConfig("budget_triangle", 2e-3, 0.0, beta2=0.98, weight_decay=0.01, clip_norm=0.5),
      training=TrainingConfig(num_steps=PRETRAINING_STEPS, eval_every=250, eval_batches=20, **often),
    )
  require_choice("task", task, TASKS)
  head = ClassifierConfig(num_classes=TASKS[task].num_classes)
  return Config(
    model=dataclasses.replace(model_of(name), task="classify", tied=True, classifier=head),
    data=DataConfig(source=f"glue:{folder}/glue/{TASKS[task].folder}", **shared),
    optimizer=OptimizerConfig(
      "warmup_cosine", 1e-3, 0.0, warmup_steps=TUNING_STEPS // 10, beta2=0.98, eps=1e-6, weight_decay=0.0
    ),
    training=TrainingConfig(num_steps=TUNING_STEPS, eval_every=TUNING_STEPS, eval_batches=1000, **often),
    init_from=init_from,
  )


def get_config(name: str = "tokenformer"):
  encoder, _, task = name.partition("/")
  return run_config(encoder, task).to_config_dict()


def score(name: str, task: str, seed: int, pretrained: bool, folder: pathlib.Path, only_done: bool) -> float | None:
  """The metric of one fine-tuned model on the held-out examples; None if it is not there and not to be trained."""
  run = folder / name / task / ("pretrained" if pretrained else "random") / f"seed_{seed}"
  done = run / "glue.json"
  if not done.exists():
    if only_done:
      return None
    train(run_config(name, task, seed, str(folder / name / "encoder") if pretrained else ""), str(run))
    data_folder = os.environ["TOKENFORMER_DATA"]
    results = evaluate(load(str(run)), load_tokenizer(str(run)), tasks=task, data_folder=data_folder, progress=False)
    done.write_text(json.dumps(results[task]))
  return json.loads(done.read_text())[METRICS[task][0]]


def table(folder: pathlib.Path, only_done: bool) -> str:
  """Markdown: the held-out loss of each encoder, and for each task mean and deviation over the seeds."""
  lines = [
    "| encoder | parameters | held-out loss | "
    + " | ".join(f"{task}, random | pretrained" for task in TUNED_ON)
    + " |",
    "|---" * (3 + 2 * len(TUNED_ON)) + "|",
  ]
  for name in PRESETS:
    encoder = folder / name / "encoder"
    if only_done and not (encoder / "done.json").exists():
      continue
    losses = held_out_losses(run_config(name), encoder)
    cells = []
    for task in TUNED_ON:
      for pretrained in (False, True):
        found = [score(name, task, seed, pretrained, folder, only_done) for seed in SEEDS]
        have = [value for value in found if value is not None]
        cells.append(f"{np.mean(have):.3f} ± {np.std(have):.3f} ({len(have)})" if have else "–")
    lines.append(f"| {name} | {model_of(name).num_parameters:,} | {losses[max(losses)]:.4f} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv):
  del argv
  folder = pathlib.Path(flags.FLAGS.workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  print(table(folder, flags.FLAGS.report), flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of all runs.", required=True)
  flags.DEFINE_bool("report", False, "Print the table of the runs that are done, and train none.")
  command.run(main)
