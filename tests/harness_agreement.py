"""Compares our zero-shot tasks with EleutherAI's harness on the same items.

    python -m tests.harness_agreement --workdir=runs/novels --limit=40

The harness reads the same files (in TOKENFORMER_DATA) through task files that hold its own prompts, and needs no
network. The script prints the number of requests, the largest difference of a log-likelihood, and for each task the
number of items and the scores, ours / the harness's.

With 5.5 million parameters (experiments/novels.py, step 600), lm_eval 0.4.13, jax 0.10.2, two CPU cores (64 s
of CPU time):

    680 requests of ours, 680 of the harness, the same: True; log-likelihoods down to -1157.3, largest
    difference 0.00e+00
    lambada_openai 40 acc 0.000000 / 0.000000 perplexity 2465706.840796 / 2465706.840796
    hellaswag 40 acc 0.275000 / 0.275000 acc_norm 0.300000 / 0.300000
    piqa 40 acc 0.575000 / 0.575000 acc_norm 0.425000 / 0.425000
    arc_easy 40 acc 0.175000 / 0.175000 acc_norm 0.225000 / 0.225000
    arc_challenge 40 acc 0.200000 / 0.200000 acc_norm 0.175000 / 0.175000
    winogrande 40 acc 0.450000 / 0.450000
"""

import json
import os
import pathlib
import tempfile
from typing import NamedTuple
from unittest import mock

from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.evaluation import evaluate, multiple_choice
from tokenformer_jax.evaluation.log_likelihood import log_likelihoods
from tokenformer_jax.evaluation.tasks import TASKS, task_rows

_CHOICES = {
  "output_type": "multiple_choice",
  "doc_to_choice": "choices",
  "doc_to_target": "gold",
  "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_ARC = _CHOICES | {"doc_to_text": "Question: {{query}}\nAnswer:"}
# The prompts of lm_eval's own task files, over the fields of the local files.
_TASK_FILES = {
  "arc_easy": _ARC,
  "arc_challenge": _ARC,
  "hellaswag": _CHOICES | {"doc_to_text": "{{query}}"},
  "piqa": _CHOICES | {"doc_to_text": "{{query}}Answer:"},  # The query ends with a line break.
  "winogrande": {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_target": "continuation",
    "doc_to_choice": "context_options",
    "metric_list": [{"metric": "acc"}],
  },
  "blimp": {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "metric_list": [{"metric": "acc"}],
  },
  "lambada_openai": {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
  },
}


class Agreement(NamedTuple):
  """What both evaluations gave: log-likelihoods by the ids of (context, continuation), scores by task and metric."""

  ours: dict[tuple, float]
  theirs: dict[tuple, float]
  our_scores: dict[str, dict[str, float]]
  their_scores: dict[str, dict[str, float]]

  def largest_difference(self) -> float:
    return max(abs(self.ours[key] - self.theirs[key]) for key in self.ours)


def agreement(model, tokenizer, tasks, data_folder, limit: int) -> Agreement:
  """Evaluates the first `limit` items of each task (of each file of BLiMP) with and without the harness."""
  from tokenformer_jax.evaluation.harness import HarnessModel

  ours, theirs = {}, {}

  def our_log_likelihoods(model, requests, *args, **kwargs):
    scores = log_likelihoods(model, requests, *args, **kwargs)
    for request, score in zip(requests, scores):
      ours[tuple(request.context), tuple(request.continuation)] = score.log_likelihood
    return scores

  of_harness = HarnessModel._loglikelihood_tokens

  def their_log_likelihoods(self, requests, **kwargs):
    scores = of_harness(self, requests, **kwargs)
    for (_, context, continuation), (log_likelihood, _) in zip(requests, scores):
      theirs[tuple(context), tuple(continuation)] = log_likelihood
    return scores

  with tempfile.TemporaryDirectory() as folder:
    for task in tasks:
      rows = pathlib.Path(folder) / f"{task}.jsonl"
      rows.write_text("\n".join(row.text for row in task_rows(task, data_folder, limit)), encoding="utf-8")
      description = _TASK_FILES[task] | {
        "task": f"local_{task}",
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": f"{folder}/cache"},
      }
      (pathlib.Path(folder) / f"{task}.yaml").write_text(json.dumps(description))  # JSON is YAML.
    with (
      mock.patch.object(multiple_choice, "log_likelihoods", our_log_likelihoods),
      mock.patch.object(HarnessModel, "_loglikelihood_tokens", their_log_likelihoods),
    ):
      our_scores = evaluate.evaluate(
        model, tokenizer, tasks=tasks, data_folder=data_folder, limit=limit, progress=False
      )
      their_scores = evaluate.evaluate(
        model, tokenizer, tasks=[f"local_{task}" for task in tasks], harness=True, task_files=folder, progress=False
      )
  return Agreement(ours, theirs, our_scores, {task: their_scores[f"local_{task}"] for task in tasks})


def main(argv):
  del argv
  model, tokenizer = evaluate.open_model(flags.FLAGS.workdir, None, None, None)
  both = agreement(model, tokenizer, flags.FLAGS.tasks, os.environ["TOKENFORMER_DATA"], flags.FLAGS.limit)
  print(
    f"{len(both.ours)} requests of ours, {len(both.theirs)} of the harness, the same: "
    f"{both.ours.keys() == both.theirs.keys()}; log-likelihoods down to {min(both.ours.values()):.1f}, "
    f"largest difference {both.largest_difference():.2e}"
  )
  for task in flags.FLAGS.tasks:
    ours, theirs = both.our_scores[task], both.their_scores[task]
    shared = [name for name in ("acc", "acc_norm", "perplexity") if name in ours and name in theirs]
    print(task, ours["questions"], *(f"{name} {ours[name]:.6f} / {theirs[name]:.6f}" for name in shared))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Work folder of a training run.", required=True)
  flags.DEFINE_integer("limit", 40, "Items of each task.")
  flags.DEFINE_list("tasks", [task for task in TASKS if task != "blimp"], "Tasks.")
  command.run(main)
