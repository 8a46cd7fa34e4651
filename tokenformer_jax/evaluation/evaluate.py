"""All measurements of one model; what the evaluate door does."""

import pathlib
from collections.abc import Sequence

from tokenformer_jax import data
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.evaluation.multiple_choice import answer
from tokenformer_jax.evaluation.perplexity import perplexity
from tokenformer_jax.evaluation.tasks import read_task
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.training.checkpoints import load, load_tokenizer


def open_model(
  workdir: str | None, step: int | None, pretrained: str | None, tokenizer: str | None
) -> tuple[LanguageModel, data.Tokenizer]:
  """The model and tokenizer of a run, or of a weight file and a tokenizer spec.

  Raises:
    ValueError: not exactly one of the two, or a tokenizer with more ids than the model.
  """
  if bool(workdir) == bool(pretrained):
    raise ValueError(f"workdir={workdir!r}, pretrained={pretrained!r}: give one of them.")
  if workdir:
    if tokenizer:
      raise ValueError(f"tokenizer={tokenizer!r}: a run brings its own; leave it out.")
    return load(workdir, step), load_tokenizer(workdir)
  if not tokenizer or step is not None:
    raise ValueError(f"pretrained={pretrained!r} needs --tokenizer (a file, folder, hub name or 'bytes'), and no step.")
  opened = data.open_tokenizer(tokenizer)
  model = from_pretrained(pretrained)
  if opened.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"tokenizer={tokenizer!r} has {opened.vocab_size} ids, the model {model.config.vocab_size}; "
      "give the model's own tokenizer."
    )
  return model, opened


def evaluate(
  model: LanguageModel,
  tokenizer,
  *,
  tasks: Sequence[str] = (),
  data_folder: str | pathlib.Path = ".",
  limit: int | None = None,
  texts: Sequence[str] = (),
  stride: int | None = None,
  harness: bool = False,
  task_files: str | None = None,
) -> dict[str, dict[str, float]]:
  """Metrics by task, and by text of `texts` (source specs of the data room).

  All that is asked for is looked up before anything is computed.

  Raises:
    ValueError: nothing to measure, an unknown task or source, or text that does not do.
  """
  if not tasks and not texts:
    raise ValueError("nothing to measure: give --tasks, --perplexity, or both.")
  corpora = {str(spec): open_corpus(spec, tokenizer) for text in texts for spec in parse_sources(text)}
  results = {}
  if harness:
    if tasks:
      results |= _harness()(model, tokenizer, list(tasks), limit=limit, include_path=task_files)
  else:
    questions = {task: read_task(task, data_folder, limit) for task in tasks}
    results |= {task: answer(model, tokenizer, asked, progress=task) for task, asked in questions.items()}
  return results | {
    name: perplexity(model, tokenizer, corpus, stride=stride, progress=name).report()
    for name, corpus in corpora.items()
  }


def _harness():
  try:
    from tokenformer_jax.evaluation.harness import run_harness
  except ImportError as error:
    raise ValueError(f"--harness: {error}; pip install 'tokenformer_jax[eval]'.") from None
  return run_harness
