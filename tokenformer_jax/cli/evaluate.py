"""Measures a model: zero-shot tasks, perplexity of texts, EleutherAI's harness, GLUE.

    python -m tokenformer_jax.cli.evaluate --workdir=runs/novels --tasks=blimp,hellaswag --data=FOLDER
    python -m tokenformer_jax.cli.evaluate --pretrained=pytorch_model.bin --tokenizer=20B_tokenizer.json \\
        --perplexity=text:book.txt --stride=512 --output=scores.json
    python -m tokenformer_jax.cli.evaluate --workdir=runs/glue --tasks=cola,rte --data=FOLDER

    python -m tokenformer_jax.cli.evaluate --workdir=runs/mnist --images=idx:FOLDER@test

The third form measures classifiers of texts: the run runs/glue, or one run for each task, runs/glue/cola and so on. The
mean of GLUE's nine numbers stands below them where all are there. The last one measures a classifier of images.

Probabilities are normalised over the tokenizer's own ids, without those that pad the vocabulary; the released
evaluation code includes them (docs/released_models.md). --output is written anew after each task and text. A model that
is too large for one device is split as in training: --mesh.fsdp=4 --mesh.token=2.
"""

from absl import flags

from tokenformer_jax.cli import command, mesh_flags, process_flags
from tokenformer_jax.config.data import BAD_TEXTS

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run; by default the newest.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "Weight file, folder or hub name, instead of --workdir.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "With --pretrained: the tokenizer; by default the one beside the weights."
)
_TASKS = flags.DEFINE_list("tasks", [], "Zero-shot tasks; with --harness, any that lm_eval knows.")
_DATA = flags.DEFINE_string("data", None, "Folder of the tasks' files; by default TOKENFORMER_DATA.")
_LIMIT = flags.DEFINE_integer("limit", None, "Number of questions to read from each file.", lower_bound=1)
_PERPLEXITY = flags.DEFINE_multi_string("perplexity", [], "Source of text to score, e.g. text:GLOB; may be repeated.")
_IMAGES = flags.DEFINE_multi_string("images", [], "Source of images with labels, of a run on images; may be repeated.")
_STRIDE = flags.DEFINE_integer("stride", None, "Ids scored per window; by default windows are disjoint.")
_BAD_TEXT = flags.DEFINE_enum("bad_text", "error", BAD_TEXTS, "What to do with text that cannot be read.")
_HARNESS = flags.DEFINE_bool("harness", False, "Run the tasks with lm-evaluation-harness.")
_TASK_FILES = flags.DEFINE_string("task_files", None, "With --harness: a folder with further task files.")
_INT8 = flags.DEFINE_bool("int8", False, "Round the parameter tokens to int8, to measure what that costs. Needs qwix.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for all results.")
mesh_flags.define()
process_flags.define()


def main(argv):
  del argv
  from tokenformer_jax.evaluation.evaluate import evaluate, open_model
  from tokenformer_jax.evaluation.glue import glue_score, runs_of_tasks
  from tokenformer_jax.evaluation.images import measure_image_run
  from tokenformer_jax.evaluation.report import Report
  from tokenformer_jax.inference.int8 import int8_tokens

  first = process_flags.start()
  with Report(_OUTPUT.value if first else None, show=first) as report:
    mesh = mesh_flags.mesh()
    if _IMAGES.value:
      if not _WORKDIR.value or _TASKS.value or _PERPLEXITY.value:
        raise ValueError("--images: measures a run on images; give its --workdir, and no tasks or texts.")
      for source in _IMAGES.value:
        report.add(source, measure_image_run(_WORKDIR.value, source, _STEP.value, mesh))
      return
    for workdir, tasks in runs_of_tasks(_WORKDIR.value, _TASKS.value):
      source = workdir, _STEP.value, _PRETRAINED.value, _TOKENIZER.value
      model, tokenizer = open_model(*source, mesh=mesh)
      evaluate(
        int8_tokens(model) if _INT8.value else model,
        tokenizer,
        tasks=tasks,
        texts=_PERPLEXITY.value,
        data_folder=_DATA.value,
        limit=_LIMIT.value,
        stride=_STRIDE.value,
        bad_text=_BAD_TEXT.value,
        harness=_HARNESS.value,
        task_files=_TASK_FILES.value,
        on_result=report.add,
      )
    if (score := glue_score(report.results)) is not None:
      report.add("glue", {"mean": score})


if __name__ == "__main__":
  command.run(main)
