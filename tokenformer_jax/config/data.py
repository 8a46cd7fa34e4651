"""What a model reads."""

import dataclasses

from tokenformer_jax.config.validation import Checked, require, require_choice

PACKINGS = ("contiguous", "documents")
BAD_TEXTS = ("error", "replace", "skip")


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """What the model reads.

  `source` is one spec string (see `tokenformer_jax.data`): `python-sources`, `text:GLOB`, …
  Held-out text is `held_out_source` if given, else `held_out_fraction` of the source's documents,
  chosen by a hash of each (of a file's name, or of the text of a part of one). `batch_size` is the
  global number of sequences in one optimizer step. `bad_text`: text that cannot be read stops the run
  (`error`); or bytes that are not UTF-8 become U+FFFD (`replace`); or the document is left out
  (`skip`); both are counted.
  """

  source: str = "python-sources"
  held_out_source: str = ""
  held_out_fraction: float = 0.05
  tokenizer: str = "bytes"
  packing: str = "contiguous"
  bad_text: str = "error"
  batch_size: int = 16
  seed: int = 0

  def validate(self):
    require(bool(self.source), "source", self.source, "name a source, e.g. python-sources or text:GLOB.")
    require(0.0 < self.held_out_fraction < 1.0, "held_out_fraction", self.held_out_fraction, "must be between 0 and 1.")
    require_choice("packing", self.packing, PACKINGS)
    require_choice("bad_text", self.bad_text, BAD_TEXTS)
    require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1.")
    require(self.seed >= 0, "seed", self.seed, "must not be negative.")
