"""Perplexity of a text per token, word and byte."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.evaluation.log_likelihood import Request, log_likelihoods
from tokenformer_jax.evaluation.report import Metrics
from tokenformer_jax.models.language_model import LanguageModel


class Perplexity(NamedTuple):
  """The log-likelihood of a text and the text's size.

  Attributes:
    nats: −log p of the whole text.
    tokens: the number of its tokens.
    words: the number of its words, which white space separates.
    bytes: the length of its UTF-8 encoding.
  """

  nats: float
  tokens: int
  words: int
  bytes: int

  def report(self) -> Metrics:
    """Perplexities per token, word and byte, the bits per byte, and the sizes.

    A perplexity beyond the range of floats is infinite; text with few spaces, such as Chinese, has words of hundreds
    of nats. The bits per byte are finite for every text.
    """
    nats_per_byte = self.nats / self.bytes if self.bytes else math.nan
    return {
      "token_perplexity": exp(self.nats / self.tokens),
      "word_perplexity": exp(self.nats / self.words),
      "byte_perplexity": exp(nats_per_byte),
      "bits_per_byte": nats_per_byte / math.log(2),
      "tokens": self.tokens,
      "words": self.words,
      "bytes": self.bytes,
    }


def exp(nats: float) -> float:
  """The perplexity exp(nats) of a mean number of nats; infinity where `math.exp` overflows."""
  try:
    return math.exp(nats)
  except OverflowError:
    return math.inf


def check_stride(stride: int | None, seq_length: int) -> int:
  """The number of ids scored per window: `stride`, or `seq_length` if it is None.

  Raises:
    ValueError: a stride outside 1 … seq_length.
  """
  stride = seq_length if stride is None else stride
  if type(stride) is not int or not 1 <= stride <= seq_length:
    raise ValueError(f"stride={stride!r}: choose 1 … {seq_length}, the model's seq_length.")
  return stride


def windows(ids: Sequence[int], end_of_document: int, length: int, stride: int) -> Iterator[Request]:
  """Yields requests that together score every id of a document exactly once.

  Each request scores `stride` ids. Its context is as many of the ids before them as fit into the model, which reads
  `length` ids: the context and all but the last of the scored ids. The end-of-document id precedes the first id.
  With stride = length, these are the windows of EleutherAI's harness: consecutive blocks, of which the last one is
  shorter and has a full context.
  """
  ids = [end_of_document, *ids]
  for start in range(1, len(ids), stride):
    end = min(start + stride, len(ids))
    yield Request(ids[max(end - length - 1, 0) : start], ids[start:end])


def perplexity(
  model: LanguageModel,
  tokenizer,
  corpus: Corpus,
  *,
  stride: int | None = None,
  progress: str | None = "perplexity",
  as_trained: bool = False,
) -> Perplexity:
  """Computes the perplexity of a corpus; no document is conditioned on another one.

  Args:
    model: the model.
    tokenizer: the model's tokenizer; the numbers of words and bytes are those of the text that it decodes.
    corpus: token ids; the end-of-document id that ends each document is not scored.
    stride: the number of ids scored per window. The model's `seq_length` (default) gives disjoint blocks, as in
      EleutherAI's harness. A smaller stride moves the window by that many ids, so that every id is conditioned on
      the `seq_length − stride` ids before it, or on all of them.
    progress: the description of the progress bar; None shows none.
    as_trained: as for `log_likelihoods`.

  Raises:
    ValueError: a stride outside 1 … seq_length, a corpus without text, or a model with NaN or infinite logits.
  """
  length = model.config.seq_length
  stride = check_stride(stride, length)
  requests: list[Request] = []
  tokens = words = size = 0
  start = 0
  for end in corpus.ends.tolist():
    ids = corpus.tokens[start:end].tolist()
    start = end
    if ids and ids[-1] == tokenizer.end_of_document:
      ids.pop()
    if not ids:
      continue
    requests += windows(ids, tokenizer.end_of_document, length, stride)
    text = tokenizer.decode(ids)
    tokens, words = tokens + len(ids), words + len(re.split(r"\s+", text))
    size += len(text.encode("utf-8", errors="surrogatepass"))
  if not requests:
    raise ValueError(f"{corpus.name} holds no text to score.")
  scores = log_likelihoods(
    model,
    requests,
    tokenizer.vocab_size,
    progress=progress,
    name=lambda i: f"{corpus.name}, window {i}",
    as_trained=as_trained,
  )
  return Perplexity(-math.fsum(score.log_likelihood for score in scores), tokens, words, size)
