"""Perplexity of a text per token, word and byte."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.evaluation.log_likelihood import Request, log_likelihoods
from tokenformer_jax.models.language_model import LanguageModel


class Perplexity(NamedTuple):
  """Attributes:
  nats: −log p of the whole text.
  tokens, words, bytes: its size; words are parted by white space.
  """

  nats: float
  tokens: int
  words: int
  bytes: int

  def report(self) -> dict[str, float]:
    """Perplexities, and bits per byte."""
    return {
      "token_perplexity": math.exp(self.nats / self.tokens),
      "word_perplexity": math.exp(self.nats / self.words),
      "byte_perplexity": math.exp(self.nats / self.bytes),
      "bits_per_byte": self.nats / self.bytes / math.log(2),
      "tokens": self.tokens,
      "words": self.words,
      "bytes": self.bytes,
    }


def windows(ids: Sequence[int], end_of_document: int, length: int, stride: int) -> Iterator[Request]:
  """Requests that score every id of a document exactly once.

  Each scores `stride` ids after as many ids before them as the model reads at once: `length` ids with all
  but the last of the scored ones. The end-of-document id stands before the first. With stride = length
  these are the windows of EleutherAI's harness: blocks that follow one another, the last, shorter one
  after a full context.
  """
  ids = [end_of_document, *ids]
  for start in range(1, len(ids), stride):
    end = min(start + stride, len(ids))
    yield Request(ids[max(end - length - 1, 0) : start], ids[start:end])


def perplexity(
  model: LanguageModel, tokenizer, corpus: Corpus, *, stride: int | None = None, progress: str | None = "perplexity"
) -> Perplexity:
  """Perplexity of every document of `corpus`, each from its own beginning.

  Args:
    corpus: token ids, documents ended by the end-of-document id, which is not scored.
    stride: ids scored at once. The model's `seq_length` (default) gives blocks, as in EleutherAI's harness;
      less slides the window on by so many, so that every id has the `seq_length − stride` before it, or all.

  Raises:
    ValueError: a stride outside 1 … seq_length.
  """
  length = model.config.seq_length
  stride = length if stride is None else stride
  if not 1 <= stride <= length:
    raise ValueError(f"stride={stride}: choose 1 … {length}, the model's seq_length.")
  requests, tokens, words, size = [], 0, 0, 0
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
  scores = log_likelihoods(model, requests, tokenizer.vocab_size, progress=progress)
  return Perplexity(-math.fsum(score.log_likelihood for score in scores), tokens, words, size)
