"""The atlas of a model on a text: what its parameter tokens know, as one page."""

from collections.abc import Mapping

import numpy as np

from tokenformer_jax import data
from tokenformer_jax.atlas.observe import observe
from tokenformer_jax.atlas.page import make_page
from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.models.language_model import LanguageModel


def atlas(
  model: LanguageModel,
  tokenizer: data.Tokenizer,
  corpus: Corpus,
  *,
  title: str,
  sequences: int = 1000,
  seq_length: int = 128,
  contexts: int = 4,
  births: Mapping[str, np.ndarray] | None = None,
) -> str:
  """Returns the atlas as HTML.

  Args:
    model: the model.
    tokenizer: the model's tokenizer.
    corpus: the text on which its parameter tokens are observed.
    title: of the page.
    sequences: how many rows of the text are read, evenly over the text; all where it has fewer.
    seq_length: the number of ids in a row.
    contexts: how many contexts are shown of each parameter token.
    births: see `observe`.

  Raises:
    ValueError: see `observe`; or the text has not one row, or `seq_length` is longer than the model's.
  """
  longest = model.config.seq_length
  if not 1 <= seq_length <= longest:
    raise ValueError(f"seq_length={seq_length}: choose 1 … {longest}, the model's seq_length.")
  for name, value in (("sequences", sequences), ("contexts", contexts)):
    if value < 1:
      raise ValueError(f"{name}={value}: must be at least 1.")
  there = len(corpus.tokens) // seq_length
  if not there:
    raise ValueError(f"{corpus.name}: {len(corpus.tokens)} tokens are fewer than one row of seq_length={seq_length}.")
  first = np.unique(np.linspace(0, there - 1, min(sequences, there)).astype(np.int64)) * seq_length
  rows = np.stack([np.asarray(corpus.read(start, start + seq_length), np.int64) for start in first.tolist()])
  layers = observe(model, rows, contexts=contexts, births=births)
  lists = [rows, *(ids for layer in layers for ids in (layer.raised, layer.lowered) if ids is not None)]
  seen = sorted(set(np.concatenate([np.unique(ids) for ids in lists]).tolist()))
  pieces = {one: tokenizer.decode([one]) if one < tokenizer.vocab_size else f"id {one}" for one in seen}
  return make_page(title, pieces, rows, layers)
