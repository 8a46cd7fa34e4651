"""All measurements of one model: `tf.evaluate`, and what the evaluate CLI calls."""

import functools
import os
from collections.abc import Callable, Sequence

import jax

from tokenformer_jax import data
from tokenformer_jax.config.data import BAD_TEXTS
from tokenformer_jax.config.validation import require, require_choice
from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.data.glue import GlueSplit
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.evaluation.glue import glue_splits, measure_glue
from tokenformer_jax.evaluation.multiple_choice import answer
from tokenformer_jax.evaluation.perplexity import check_stride, perplexity
from tokenformer_jax.evaluation.report import Metrics, Results
from tokenformer_jax.evaluation.tasks import read_task
from tokenformer_jax.interop.hub import local_path
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.text_encoder import TextClassifier
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.checkpoints import load, load_tokenizer


def open_model(
  workdir: str | None,
  step: int | None,
  pretrained: str | None,
  tokenizer: str | None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[LanguageModel | TextClassifier, data.Tokenizer]:
  """Opens the model and tokenizer of a run, or of a weight file and a tokenizer.

  Args:
    workdir: the work folder of a training run; None with `pretrained`.
    step: the checkpoint of the run; None takes the newest.
    pretrained: a weight file, a folder or a hub name; None with `workdir`.
    tokenizer: the tokenizer of `pretrained`: a file, a folder, a hub name or `bytes`; None takes the one beside it.
    mesh: the devices that share the parameters, of which each reads only its part; None is the first device.

  Raises:
    ValueError: both or neither of `workdir` and `pretrained`, an empty name, or a tokenizer with more ids than the
      model.
  """
  if workdir is not None and pretrained is None:
    if tokenizer is not None:
      raise ValueError(f"tokenizer={tokenizer!r}: a run has its own tokenizer; leave this one out.")
    workdir = os.fspath(user_path(workdir, "workdir"))
    return load(workdir, step, mesh), load_tokenizer(workdir)
  if workdir is not None or pretrained is None:
    raise ValueError(f"workdir={workdir!r}, pretrained={pretrained!r}: give exactly one of them.")
  require(bool(pretrained), "pretrained", pretrained, "name a weight file, a folder or a hub name.")
  require(step is None, "step", step, "only a run (workdir) has steps; leave it out.")
  if tokenizer is None:
    weights = local_path(pretrained, "pretrained")
    tokenizer = os.fspath(weights if weights.is_dir() else weights.parent)
  opened = data.open_tokenizer(tokenizer)
  model = from_pretrained(pretrained, mesh=mesh)
  if opened.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"tokenizer={tokenizer!r} has {opened.vocab_size} ids, the model {model.config.vocab_size}; "
      "give the model's own tokenizer."
    )
  return model, opened


def evaluate(
  model: LanguageModel | TextClassifier,
  tokenizer: data.Tokenizer,
  *,
  tasks: str | Sequence[str] = (),
  texts: str | Sequence[str] = (),
  data_folder: str | os.PathLike | None = None,
  limit: int | None = None,
  stride: int | None = None,
  bad_text: str = "error",
  harness: bool = False,
  task_files: str | os.PathLike | None = None,
  progress: bool = True,
  on_result: Callable[[str, Metrics], None] | None = None,
) -> Results:
  """Measures a language model on zero-shot tasks and on texts, or a classifier of texts on the task that it knows.

      model, tokenizer = tf.load("runs/novels"), tf.load_tokenizer("runs/novels")
      results = tf.evaluate(model, tokenizer, tasks=["piqa", "blimp"], texts="text:book.txt", data_folder="DATA")
      results["piqa"]["acc"], results["text:book.txt"]["bits_per_byte"]

  All tasks and texts are read and checked before the model is run.

  Args:
    model: the model, with float or int8 parameters; or a classifier of texts.
    tokenizer: the model's tokenizer.
    tasks: one or more of `evaluation.tasks.TASKS` (lambada_openai, hellaswag, piqa, arc_easy, arc_challenge,
      winogrande, blimp); of a classifier, tasks of GLUE (`evaluation.glue.METRICS`: cola, sst2, mrpc, …); with `harness`, names that lm_eval knows or paths of its task files.
    texts: one or more source specs of texts whose perplexity is measured, such as `text:GLOB`, `jsonl:GLOB#FIELD` or
      `tokens:PATH`.
    data_folder: the folder with the tasks' files, local or a URI. By default it is the one that the environment
      variable TOKENFORMER_DATA names, or else the current folder.
    limit: the number of questions to read from each file of a task; None reads all.
    stride: the number of ids scored per window of a text; None scores disjoint windows of the model's length.
    bad_text: what to do with text that cannot be read: `error`, `replace` or `skip`.
    harness: run the tasks with EleutherAI's lm-evaluation-harness (the extra `eval`), which downloads their data.
    task_files: with `harness`, a local folder with further task files.
    progress: whether to show progress on stderr.
    on_result: called as `on_result(name, metrics)` when a task or text is finished, so that a later failure does not
      lose its results.

  Returns:
    Metrics by the name of the task or text. Standard errors have the metric's name with `_stderr`. Perplexities
    beyond the range of floats are infinite; the bits per byte of a text and the log_perplexity of a task are finite.
    Accuracies are shares, from 0 to 1. A model with routed blocks (`config.depth`) is measured under the causal rule that
    it generates by; `token_perplexity_as_trained` and `bits_per_byte_as_trained` are those of the training's choices, which
    look into the future.

  Raises:
    ValueError: another kind of model, nothing to measure, an argument without effect or out of range, an unknown task or source, text or a
      row of a task that cannot be read, or a model whose parameters or logits are NaN or infinite.
  """
  tasks, texts = ([given] if isinstance(given, str) else list(given) for given in (tasks, texts))
  if not isinstance(model, (LanguageModel, TextClassifier)):
    raise ValueError(
      f"model is a {type(model).__name__}: expected a LanguageModel, which scores whole texts, or a TextClassifier."
    )
  require(bool(tasks or texts), "tasks", tasks, "there is nothing to measure; name tasks, texts or both.")
  require(limit is None or (type(limit) is int and limit >= 1), "limit", limit, "must be a positive whole number.")
  require_choice("bad_text", bad_text, BAD_TEXTS)
  require(not harness or bool(tasks), "harness", harness, "runs tasks; name at least one.")
  require(task_files is None or harness, "task_files", task_files, "only the harness reads them; set harness too.")
  require(
    data_folder is None or not harness,
    "data_folder",
    data_folder,
    "the harness downloads its own data; leave the folder out, or give task_files.",
  )
  require(stride is None or bool(texts), "stride", stride, "belongs to the perplexity of texts; name some.")
  check_stride(stride, model.config.seq_length)
  folder = os.environ.get("TOKENFORMER_DATA") or "." if data_folder is None else data_folder
  if isinstance(model, TextClassifier):
    for name, value in dict(texts=texts, harness=harness).items():
      require(not value, name, value, "model is a TextClassifier, which is measured on tasks of GLUE; leave it out.")
    splits = glue_splits(tasks, folder, limit)
    return _measured([functools.partial(_glue, model, tokenizer, task, splits[task]) for task in splits], on_result)

  corpora = _corpora(texts, tokenizer, bad_text)
  measurements: list[Callable[[], Results]] = []
  if harness:
    runs = _harness()(model, tokenizer, tasks, limit=limit, task_files=task_files, progress=progress)
    measurements += [functools.partial(next, runs)] * len(dict.fromkeys(tasks))
  else:
    questions = {task: read_task(task, folder, limit) for task in tasks}

    def run_task(task: str) -> Results:
      return {task: answer(model, tokenizer, questions[task], progress=task if progress else None)}

    measurements += [functools.partial(run_task, task) for task in questions]

  def run_text(name: str) -> Results:
    shown = name if progress else None
    measure = functools.partial(perplexity, model, tokenizer, corpora[name], stride=stride, progress=shown)
    metrics = measure().report()
    if model.config.depth.is_routed:
      as_trained = measure(as_trained=True).report()
      metrics |= {f"{key}_as_trained": as_trained[key] for key in ("token_perplexity", "bits_per_byte")}
    return {name: metrics}

  measurements += [functools.partial(run_text, name) for name in corpora]

  return _measured(measurements, on_result)


def _measured(
  measurements: Sequence[Callable[[], Results]], on_result: Callable[[str, Metrics], None] | None
) -> Results:
  """The results of all measurements, each of which is told to `on_result` when it is there."""
  results: Results = {}
  for measure in measurements:
    measured = measure()
    results |= measured
    if on_result is not None:
      for name, metrics in measured.items():
        on_result(name, metrics)
  return results


def _glue(model: TextClassifier, tokenizer, task: str, splits: dict[str, GlueSplit]) -> Results:
  return {task: measure_glue(model, tokenizer, splits)}


def _corpora(texts: Sequence[str], tokenizer, bad_text: str) -> dict[str, Corpus]:
  specs = [spec for text in texts for spec in parse_sources(text)]
  for spec in specs:
    require(spec.weight == 1, "weight", spec.weight, f"texts are measured one by one; write {spec} without a weight.")
  return {str(spec): open_corpus(spec, tokenizer, bad_text) for spec in specs}


def _harness():
  try:
    from tokenformer_jax.evaluation.harness import run_harness
  except ImportError as error:
    raise ValueError(f"the harness is not installed ({error}); pip install 'tokenformer_jax[eval]'.") from None
  return run_harness
