"""A model class for EleutherAI's lm-evaluation-harness, registered as `tokenformer_jax` on import.

The harness (pip install lm_eval) loads no plug-ins by itself: import this module, then call it.
"""

import re

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
import numpy as np

from tokenformer_jax.evaluation.log_likelihood import Request, log_likelihoods
from tokenformer_jax.evaluation.perplexity import windows
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.models.language_model import LanguageModel

MAX_NEW_TOKENS = 256


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
    documents = [list(windows(self.tok_encode(text), self.eot_token_id, self.max_length, self.max_length))
                 for text, in (request.args for request in requests)]
    scores = iter(self._scores([window for document in documents for window in document], disable_tqdm))
    return [sum(next(scores)[0] for _ in document) for document in documents]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    del disable_tqdm
    texts = []
    for context, settings in (request.args for request in requests):
      stop = settings.get("until") or ()
      new = min(settings.get("max_gen_toks", MAX_NEW_TOKENS), self.max_length - 1)
      prompt = self.tok_encode(context)[-(self.max_length - new):] or [self.eot_token_id]
      temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
      text, = generate(self._model, self._tokens, [prompt], max_new_tokens=new, temperature=temperature, stop=stop)
      texts.append(text)
    return texts

  def _scores(self, requests: list[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
    progress = None if disable_tqdm else "log-likelihoods"
    return [tuple(score) for score in
            log_likelihoods(self._model, requests, self._tokens.vocab_size, progress=progress)]


def run_harness(model: LanguageModel, tokenizer, tasks: list[str], *, limit: int | None = None,
                include_path: str | None = None) -> dict[str, dict[str, float]]:
  """The harness's results by task: every metric and its standard error.

  Args:
    tasks: names the harness knows.
    limit: questions a task.
    include_path: a folder with further task files (YAML).
  """
  manager = TaskManager(include_path=include_path)
  results = lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=tasks, limit=limit, task_manager=manager,
                                    bootstrap_iters=1000)["results"]
  return {task: {re.sub(r",\w+$", "", name): float(value) for name, value in metrics.items()
                 if isinstance(value, (int, float, np.number))}
          for task, metrics in results.items()}
