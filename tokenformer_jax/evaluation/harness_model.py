"""The model class for EleutherAI's lm-evaluation-harness, registered as `tokenformer_jax` on import.

The harness (pip install lm_eval) loads no plug-ins by itself: import this module, then call the harness.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from tokenformer_jax.evaluation.log_likelihood import Request, encode_pair, log_likelihoods
from tokenformer_jax.evaluation.perplexity import windows
from tokenformer_jax.inference.decoding import bucket
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.inference.sampling import Sampling
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.progress import Progress

_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
# A batch of generation has at most this many rows, and its key-value cache at most this many bytes.
_MAX_ROWS = 32
_CACHE_BYTES = 2**32


class Settings(NamedTuple):
  """How a text is generated; requests with equal settings share a batch."""

  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  repetition_penalty: float
  stop: tuple[str, ...]


@register_model("tokenformer_jax")
class HarnessModel(TemplateLM):
  """A language model as the harness calls it: `lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=[…])`.

  Args:
    model: the model.
    tokenizer: the model's tokenizer.
    progress: whether to show progress on stderr.
  """

  def __init__(self, model: LanguageModel, tokenizer, *, progress: bool = True):
    super().__init__()
    self._model, self._tokens, self._progress = model, tokenizer, progress

  @property
  def eot_token_id(self) -> int:
    return self._tokens.end_of_document

  @property
  def max_length(self) -> int:
    return self._model.config.seq_length

  @property
  def max_gen_toks(self) -> int:
    """The number of new tokens if a task names none: 256 as in the harness, but at most half of `max_length`."""
    return min(256, self.max_length // 2)

  @property
  def tokenizer_name(self) -> str:
    return self._tokens.fingerprint

  def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
    del add_special_tokens, kwargs
    return list(self._tokens.encode(string))

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Scores (context, continuation) texts, encoded as the harness encodes them.

    Raises:
      ValueError: a continuation that has no tokens of its own or more than the model reads; the message names the
        task and the document.
    """
    encoded = []
    for request in requests:
      context, continuation = request.args
      # The harness itself fails with an IndexError if the continuation of an empty context is empty too.
      pair = self._encode_pair(context, continuation) if context else encode_pair(self._tokens, "", continuation)
      encoded.append(((context, continuation), *pair))
    return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm, names=_names(requests))

  def _loglikelihood_tokens(
    self, requests, disable_tqdm: bool = False, names: Sequence[str] | None = None, **kwargs
  ) -> list[tuple[float, bool]]:
    del kwargs
    pairs = [Request(context, continuation) for _, context, continuation in requests]
    return self._scores(pairs, names or [f"request {i}" for i in range(len(pairs))], disable_tqdm)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-likelihoods of whole texts, each the sum over its disjoint windows."""
    documents = [
      list(windows(self.tok_encode(text), self.eot_token_id, self.max_length, self.max_length))
      for (text,) in (request.args for request in requests)
    ]
    names = [name for name, document in zip(_names(requests), documents) for _ in document]
    scores = iter(self._scores([window for document in documents for window in document], names, disable_tqdm))
    return [sum(next(scores)[0] for _ in document) for document in documents]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continues texts up to a stop string, which is left out, to the end of the document or to `max_gen_toks`.

    A context loses its beginning if it and the new tokens do not fit into the model together. Greedy requests with
    equal settings are generated in batches, longest first. The rows of a batch do not depend on one another, so a text
    is the one that would be generated alone; only if two tokens are equally likely up to rounding, another shape of the
    batch may choose the other one. A sampled text is generated alone, with the number of its request as the seed: a
    task that repeats a request wants different texts, and none of them may depend on how requests are batched.

    Raises:
      ValueError: a setting that is unknown or out of range, or as many new tokens as the model reads; the message
        names the task and the document.
    """
    names = _names(requests)
    prompts, settings = [], []
    for request, name in zip(requests, names):
      context, options = request.args
      settings.append(self._settings(options, name))
      context_length = self.max_length - settings[-1].max_new_tokens
      prompts.append(self.tok_encode(context)[-context_length:] or [self.eot_token_id])
    model = self._model.for_decoding()
    texts = [""] * len(requests)
    with Progress(len(requests), "texts", shown=self._progress and not disable_tqdm, seconds=60) as bar:
      for chosen in self._batches(prompts, settings):
        rows = [prompts[i] for i in chosen]
        # One program is compiled per number of rows, so the last batch is filled up to a power of two.
        rows += rows[-1:] * (_power_of_two_from(len(rows)) - len(rows))
        generated = generate(model, self._tokens, rows, seed=chosen[0], **settings[chosen[0]]._asdict())
        for i, text in zip(chosen, generated):
          texts[i] = text
        bar.update(len(chosen))
    return texts

  def _settings(self, options: dict, name: str) -> Settings:
    """The settings of a task's generation_kwargs."""
    try:
      options = normalize_gen_kwargs(options, self.max_gen_toks)
      if unknown := sorted(set(options) - _GENERATION_SETTINGS):
        raise ValueError(
          f"{', '.join(unknown)} unknown: remove it from the task file; known are "
          f"{', '.join(sorted(_GENERATION_SETTINGS))}."
        )
      stop = tuple(stop for stop in options["until"] if stop)
      if not all(isinstance(text, str) for text in stop):
        raise ValueError(f"until={options['until']!r}: expected strings.")
      new = options["max_gen_toks"]
      if not 1 <= new < self.max_length:
        raise ValueError(
          f"max_gen_toks={new} leaves no space for a context in the model's seq_length={self.max_length}; choose "
          f"1 … {self.max_length - 1}."
        )
      sampled = options["do_sample"]
      settings = Settings(
        max_new_tokens=new,
        temperature=options.get("temperature", 1.0) if sampled else 0.0,
        top_k=options.get("top_k", 0) if sampled else 0,
        top_p=options.get("top_p", 1.0) if sampled else 1.0,
        repetition_penalty=options.get("repetition_penalty", 1.0),
        stop=stop,
      )
      Sampling.checked(
        vocab_size=self._tokens.vocab_size,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
      )
      return settings
    except (TypeError, ValueError) as error:
      raise ValueError(f"{name}: generation_kwargs: {error}") from None

  def _batches(self, prompts: list[list[int]], settings: list[Settings]) -> Iterator[list[int]]:
    """Yields the numbers of the requests of each batch."""
    groups: dict[Settings, list[int]] = {}
    for i, of_request in enumerate(settings):
      groups.setdefault(of_request, []).append(i)
    for of_group, members in groups.items():
      if of_group.temperature > 0:
        yield from ([i] for i in members)
        continue
      # The longest prompts come first, so that a batch that exceeds the memory fails at once.
      members.sort(key=lambda i: -len(prompts[i]))
      while members:
        rows = self._max_rows(len(prompts[members[0]]), of_group.max_new_tokens)
        yield members[:rows]
        members = members[rows:]

  def _max_rows(self, prompt_length: int, max_new_tokens: int) -> int:
    """The number of rows, a power of two, whose key-value cache is within its limit."""
    config = self._model.config
    num_slots = bucket(bucket(prompt_length) + max_new_tokens)
    channels = config.num_kv_heads * config.head_dim
    row_bytes = 2 * config.num_layers * channels * num_slots * jnp.dtype(config.compute_dtype).itemsize
    rows = max(1, min(_MAX_ROWS, _CACHE_BYTES // row_bytes))
    return 2 ** (rows.bit_length() - 1)

  def _scores(self, requests: list[Request], names: Sequence[str], disable_tqdm: bool) -> list[tuple[float, bool]]:
    scores = log_likelihoods(
      self._model,
      requests,
      self._tokens.vocab_size,
      progress="log-likelihoods" if self._progress and not disable_tqdm else None,
      name=lambda i: names[i],
    )
    return [(score.log_likelihood, score.greedy) for score in scores]


def _power_of_two_from(count: int) -> int:
  return 2 ** (count - 1).bit_length()


def _names(requests) -> list[str]:
  """Descriptions of the harness's requests, for messages."""
  return [
    f"request {i}" if request.task_name is None else f"task {request.task_name}, document {request.doc_id}"
    for i, request in enumerate(requests)
  ]
