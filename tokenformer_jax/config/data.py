"""The configuration of what a model reads."""

import dataclasses
import re

from tokenformer_jax.config.images import ImagesConfig
from tokenformer_jax.config.validation import Checked, require, require_choice

PACKINGS = ("contiguous", "documents")
SPECIAL_TOKENS = ("recognise", "text")
BAD_TEXTS = ("error", "replace", "skip")
MAIN_HELD_OUT = "held_out"  # The name of the held-out text that every run has.
_TAKEN_NAMES = (MAIN_HELD_OUT, "train")  # What `Data.report` calls the other texts.


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """What the model reads.

  Attributes:
    source: what to train on, one spec string (see `tokenformer_jax.data`): `python-sources`, `text:GLOB`, `idx:FOLDER`, …
    held_out_source: the spec of the held-out text; if it is empty, documents of `source` are held out.
    held_out_fraction: the fraction of `source`'s documents that is held out if there is no `held_out_source`. A hash
      of each document (of a file's name, or of the text where a file has several documents) decides.
    held_out_sets: further held-out texts that are evaluated under their own names, `NAME=SPEC + NAME=SPEC`, as in
      `books=text:books/*.txt + code=text:src/*.py`; a part without a name continues the mixture of the set before it.
    tokenizer: what `tokenformer_jax.data.open_tokenizer` takes.
    special_tokens: what the name of a special token, such as `<|endoftext|>`, means inside a document: its special id
      (`recognise`), or plain text like any other (`text`). The tokenizer `bytes` has no such names.
    packing: how rows are made: windows over documents laid end to end (`contiguous`), or whole documents with attention
      inside each (`documents`).
    bad_text: what happens to text that cannot be read: it stops the run (`error`), bytes that are not UTF-8 become
      U+FFFD (`replace`), or the document is left out (`skip`). Replacements and documents left out are counted.
    mask_rate: the share of the tokens that masked language modelling hides.
    mask_token: the token that hides them; "" takes `[MASK]` and the like, or the byte 0xFF, which no text has.
    batch_size: the global number of sequences in one optimizer step.
    seed: the seed of the order of the training rows, and of the random changes of images.
    images: what happens to images; for models that read them.
  """

  source: str = "python-sources"
  held_out_source: str = ""
  held_out_fraction: float = 0.05
  held_out_sets: str = ""
  tokenizer: str = "bytes"
  special_tokens: str = "recognise"
  packing: str = "contiguous"
  bad_text: str = "error"
  mask_rate: float = 0.25
  mask_token: str = ""
  batch_size: int = 16
  seed: int = 0
  images: ImagesConfig = ImagesConfig()

  def validate(self) -> None:
    require(bool(self.source), "source", self.source, "name a source, e.g. python-sources or text:GLOB.")
    require(0.0 < self.held_out_fraction < 1.0, "held_out_fraction", self.held_out_fraction, "must be between 0 and 1.")
    self.named_held_out_sources()
    require_choice("special_tokens", self.special_tokens, SPECIAL_TOKENS)
    require_choice("packing", self.packing, PACKINGS)
    require_choice("bad_text", self.bad_text, BAD_TEXTS)
    require(0.0 < self.mask_rate < 1.0, "mask_rate", self.mask_rate, "must be between 0 and 1.")
    require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1.")
    require(self.seed >= 0, "seed", self.seed, "must not be negative.")

  def named_held_out_sources(self) -> dict[str, str]:
    """The source spec of each set in `held_out_sets` by its name, in the order in which they are written.

    Raises:
      ValueError: a part before the first name, a name without a source, or a name that is taken or appears twice.
    """
    sources: dict[str, str] = {}
    name = ""
    for part in self.held_out_sets.split(" + ") if self.held_out_sets else ():
      given = re.match(r"\s*([A-Za-z0-9_-]+)=", part)
      spec = part[given.end() if given else 0 :].strip()
      require(bool(given or name), "held_out_sets", self.held_out_sets, f"name the set, as in books={spec}.")
      if not given:
        sources[name] += f" + {spec}"
        continue
      name = given.group(1)
      require(bool(spec), "held_out_sets", self.held_out_sets, f"{name}= has no source; write {name}=text:GLOB.")
      require(
        name not in sources, "held_out_sets", self.held_out_sets, f"{name!r} names two sets; choose another name."
      )
      require(name not in _TAKEN_NAMES, "held_out_sets", self.held_out_sets, f"{name!r} is taken; choose another name.")
      sources[name] = spec
    return sources
