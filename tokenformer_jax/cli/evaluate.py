"""Measures a model: zero-shot tasks, perplexity of texts, EleutherAI's harness.

    python -m tokenformer_jax.cli.evaluate --workdir=runs/novels --tasks=blimp,hellaswag --data=FOLDER
    python -m tokenformer_jax.cli.evaluate --pretrained=pytorch_model.bin --tokenizer=20B_tokenizer.json \\
        --perplexity=text:book.txt --stride=512 --output=scores.json

Probabilities are over the tokenizer's own ids, without those that pad the vocabulary; the released evaluation code
leaves these in (docs/released_models.md). --perplexity scores blocks of the model's length, or slides with --stride.
"""

import os

from absl import flags

from tokenformer_jax.cli import command, process_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run; by default the newest.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "Weight file, folder or hub name, in the place of --workdir.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "With --pretrained: the tokenizer.")
_TASKS = flags.DEFINE_list("tasks", [], "Zero-shot tasks; with --harness, any that lm_eval knows.")
_DATA = flags.DEFINE_string("data", None, "Folder of the tasks' files; by default TOKENFORMER_DATA.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only so many questions of each file.", lower_bound=1)
_PERPLEXITY = flags.DEFINE_multi_string("perplexity", [], "Source of text to score, e.g. text:GLOB; repeat.")
_STRIDE = flags.DEFINE_integer("stride", None, "Ids scored a window; by default disjoint windows.")
_HARNESS = flags.DEFINE_bool("harness", False, "Run the tasks with lm-evaluation-harness.")
_TASK_FILES = flags.DEFINE_string("task_files", None, "With --harness: a folder with further task files.")
_INT8 = flags.DEFINE_bool("int8", False, "Parameter tokens in int8, to see what that costs. Needs qwix.")
_OUTPUT = flags.DEFINE_string("output", None, "Also write all results to this JSON file.")
process_flags.define()


def main(argv):
  del argv
  from tokenformer_jax.evaluation.evaluate import evaluate, open_model
  from tokenformer_jax.evaluation.report import table, write_json
  from tokenformer_jax.inference.int8 import int8_tokens

  first = process_flags.start()
  model, tokenizer = open_model(_WORKDIR.value, _STEP.value, _PRETRAINED.value, _TOKENIZER.value)
  if _INT8.value:
    model = int8_tokens(model)
  results = evaluate(
    model,
    tokenizer,
    tasks=_TASKS.value,
    data_folder=_DATA.value or os.environ.get("TOKENFORMER_DATA", "."),
    limit=_LIMIT.value,
    texts=_PERPLEXITY.value,
    stride=_STRIDE.value,
    harness=_HARNESS.value,
    task_files=_TASK_FILES.value,
  )
  if first:
    print(table(results))
  if first and _OUTPUT.value:
    write_json(_OUTPUT.value, results)


if __name__ == "__main__":
  command.run(main)
