"""A model class for EleutherAI's lm-evaluation-harness, registered as `tokenformer_jax` on import.

The harness (pip install lm_eval) loads no plug-ins by itself: import this module, then call it.
"""

import os
import pathlib
import re
import sys

import lm_eval
import numpy as np
import tqdm
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.evaluation.log_likelihood import Request, log_likelihoods
from tokenformer_jax.evaluation.perplexity import windows
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.models.language_model import LanguageModel

_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("tokenformer_jax")
class HarnessModel(TemplateLM):
  """`lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=[…])`."""

  def __init__(self, model: LanguageModel, tokenizer):
    super().__init__()
    self._model, self._tokens = model, tokenizer

  @property
  def eot_token_id(self) -> int:
    return self._tokens.end_of_document

  @property
  def max_length(self) -> int:
    return self._model.config.seq_length

  @property
  def max_gen_toks(self) -> int:
    """New tokens where a task does not say: the harness's 256, but no more than half of a short model."""
    return min(256, self.max_length // 2)

  @property
  def tokenizer_name(self) -> str:
    return self._tokens.fingerprint

  def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
    del add_special_tokens, kwargs
    return list(self._tokens.encode(string))

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
    del kwargs
    requests = [Request(context, continuation) for _, context, continuation in requests]
    return self._scores(requests, disable_tqdm)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    documents = [
      list(windows(self.tok_encode(text), self.eot_token_id, self.max_length, self.max_length))
      for (text,) in (request.args for request in requests)
    ]
    scores = iter(self._scores([window for document in documents for window in document], disable_tqdm))
    return [sum(next(scores)[0] for _ in document) for document in documents]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Texts up to the first of the strings `until`, which is left out, or the end of the document.

    A context loses its beginning where it and the new tokens do not fit into the model together.

    Raises:
      ValueError: a task asks for as many new tokens as the model reads, or for a setting that is not here.
    """
    model = self._model.for_decoding()
    # Each its own seed: a task that asks for the same text several times wants several.
    return [
      self._continue(model, *request.args, seed=number)
      for number, request in enumerate(
        tqdm.tqdm(requests, desc="texts", disable=disable_tqdm, dynamic_ncols=True, file=sys.stderr)
      )
    ]

  def _continue(self, model: LanguageModel, context: str, settings: dict, seed: int) -> str:
    settings = normalize_gen_kwargs(settings, self.max_gen_toks)
    if unknown := sorted(set(settings) - _GENERATION_SETTINGS):
      raise ValueError(
        f"generation_kwargs: {', '.join(unknown)} unknown: leave them out of the task "
        f"file; there are {', '.join(sorted(_GENERATION_SETTINGS))}."
      )
    new = settings["max_gen_toks"]
    if new >= self.max_length:
      raise ValueError(
        f"max_gen_toks={new} leaves no room for a context in the model's seq_length="
        f"{self.max_length}; ask for fewer in the task's generation_kwargs."
      )
    prompt = self.tok_encode(context)[-(self.max_length - new) :] or [self.eot_token_id]
    (text,) = generate(
      model,
      self._tokens,
      [prompt],
      max_new_tokens=new,
      seed=seed,
      temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
      top_k=settings.get("top_k", 0),
      top_p=settings.get("top_p", 1.0),
      stop=[stop for stop in settings["until"] if stop],
    )
    return text

  def _scores(self, requests: list[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
    progress = None if disable_tqdm else "log-likelihoods"
    return [
      tuple(score) for score in log_likelihoods(self._model, requests, self._tokens.vocab_size, progress=progress)
    ]


def run_harness(
  model: LanguageModel, tokenizer, tasks: list[str], *, limit: int | None = None, include_path: str | None = None
) -> dict[str, dict[str, float]]:
  """The harness's results by task: every metric and its standard error.

  Args:
    tasks: names the harness knows, or task files.
    limit: questions a task.
    include_path: a folder with further task files (YAML).

  Raises:
    ValueError: an unknown task, no such folder, or data of a task that cannot be fetched.
  """
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise ValueError(f"task_files={include_path!r} is no folder; name the one that holds the task files.")
  # The harness's own list, some 14,000 files, is read only where a task is not in the folder.
  manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
  if include_path and not set(tasks) <= set(manager.all_tasks):
    manager = TaskManager(include_path=include_path)
  for task in tasks:
    if task not in manager.all_tasks and not pathlib.Path(task).is_file():
      raise ValueError(
        f"task {task!r} is unknown to lm_eval {lm_eval.__version__}."
        f"{nearest(task, manager.all_tasks) or ' Its task files: --task_files.'}"
      )
  # It would fork processes for some standard errors, which JAX's threads do not survive.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  try:
    results = lm_eval.simple_evaluate(
      HarnessModel(model, tokenizer), tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=1000
    )["results"]
  except ConnectionError as error:
    raise ValueError(
      f"tasks={','.join(tasks)}: {error}. The harness downloads what its tasks ask; without a "
      "network, leave out --harness and give --data, or give your own --task_files."
    ) from None
  return {
    task: {
      re.sub(r",\w+$", "", name): float(value)
      for name, value in metrics.items()
      if isinstance(value, (int, float, np.number))
    }
    for task, metrics in results.items()
  }
