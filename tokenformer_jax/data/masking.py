"""Masks of masked language modelling (arXiv 1810.04805), as crammed BERT draws them (arXiv 2212.14034)."""

import dataclasses
import hashlib

import numpy as np

from tokenformer_jax.data.batches import Batch, MaskedBatch
from tokenformer_jax.data.tokenizer import Tokenizer

MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>", "<0xFF>")
_MASKED, _RANDOM = 0.8, 0.1  # The shares of the chosen tokens that become the mask and a random id; the others stay.


@dataclasses.dataclass(frozen=True)
class Masking:
  """Chooses exactly round(rate · n) of the n tokens of a row, whatever they are, and hides them.

  Of m chosen tokens, round(0.8 m) become the mask, round(0.1 m) a random id, and the others stay as they are. The choice
  is a function of the seed and the number of the sample alone, so that every epoch masks other tokens and a resumed run
  masks the same. It uses the raw words of NumPy's Philox generator, which no version of NumPy changes.

  Attributes:
    rate: the share of the tokens that are chosen.
    mask_id: the id of the mask.
    vocab_size: random ids are below this.
    seed: of the choices; anything with a text.
  """

  rate: float
  mask_id: int
  vocab_size: int
  seed: int | str

  def num_places(self, length: int) -> int:
    """The number of chosen tokens in a row of `length` tokens."""
    return round(self.rate * length)

  def __call__(self, row: Batch, sample: int) -> MaskedBatch:
    """The masked form of a row of T tokens, with M = round(rate · T) places.

    Args:
      row: its labels are not read.
      sample: the number of the row in the order of training or of evaluation.
    """
    length = len(row.inputs)
    real = np.arange(length) if row.segments is None else np.flatnonzero(row.segments)
    words = self._words(sample, 2 * length)
    count, size = self.num_places(len(real)), self.num_places(length)
    chosen = real[np.argsort(words[: len(real)], kind="stable")[:count]]
    num_masked, num_random = round(_MASKED * count), round(_RANDOM * count)
    inputs = row.inputs.copy()
    inputs[chosen[:num_masked]] = self.mask_id
    inputs[chosen[num_masked : num_masked + num_random]] = words[length : length + num_random] % self.vocab_size
    places = np.zeros(size, np.int32)
    places[:count] = np.sort(chosen)
    weights = None if row.segments is None else (np.arange(size) < count).astype(np.float32)
    return MaskedBatch(inputs, places, row.inputs[places], weights, row.positions, row.segments)

  def _words(self, sample: int, count: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(f"masks {self.seed}".encode()).digest()[:16], "little")
    return np.random.Philox(key=key, counter=sample << 64).random_raw(count)


def mask_id(tokenizer: Tokenizer, name: str, spec: str) -> int:
  """The id of the mask.

  Args:
    tokenizer: the tokenizer.
    name: the name of the mask's token; "" takes the first of `MASK_TOKENS` that the tokenizer has.
    spec: what the user calls the tokenizer, for the message.

  Raises:
    ValueError: the tokenizer has no such token.
  """
  ids = [tokenizer.token_id(token) for token in ((name,) if name else MASK_TOKENS)]
  found = next((i for i in ids if i is not None), None)
  if found is None:
    missing = f"no token {name!r}" if name else f"none of {', '.join(MASK_TOKENS)}"
    raise ValueError(
      f"data.tokenizer={spec!r} has {missing} to mask with: name a token of its vocabulary that the texts do not "
      "contain in data.mask_token, such as an unused special token, or 'ÿ' (the byte 0xFF) of GPT-2's vocabulary."
    )
  return found
