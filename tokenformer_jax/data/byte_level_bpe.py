"""GPT-2's kind of tokenizer: byte-level BPE with one special token that ends documents."""

import json
from collections.abc import Iterable

END_OF_DOCUMENT = "<|endoftext|>"


def describe(model) -> dict:
  """The parsed tokenizer.json of GPT-2's tokenizer around a `tokenizers.models.BPE`."""
  return json.loads(_tokenizer(model).to_str())


def train(texts: Iterable[str], vocab_size: int) -> dict:
  """The parsed tokenizer.json of a BPE with at most `vocab_size` ids, learnt from the texts.

  Raises ValueError if the 256 bytes and the end of document do not fit.
  """
  import tokenizers

  if vocab_size < 257:
    raise ValueError(f"a BPE of {vocab_size} ids has no room for 256 bytes and the end of document: take at least 257.")
  tokenizer = _tokenizer(tokenizers.models.BPE())
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_DOCUMENT],
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return json.loads(tokenizer.to_str())


def _tokenizer(model):
  import tokenizers

  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  if tokenizer.token_to_id(END_OF_DOCUMENT) is not None:
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
  return tokenizer
