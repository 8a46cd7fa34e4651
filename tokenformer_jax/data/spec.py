"""Parses source specs, the form of `config.data.source`: `[WEIGHT*]KIND[:REST]`, several joined by ' + '."""

import re
from typing import NamedTuple

from tokenformer_jax.config.validation import nearest

KINDS = {
  "python-sources": "python-sources",
  "text": "text:GLOB[#MARKER]",
  "jsonl": "jsonl:GLOB#FIELD",
  "tokens": "tokens:PATH[#DTYPE]",
  "tfds": "tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FEATURE]",
  "huggingface": "huggingface:NAME[,CONFIG][@SPLIT][#FIELD]",
  "idx": "idx:FOLDER[@SPLIT]",
  "npz": "npz:FILE",
  "folder": "folder:FOLDER",
}


class SourceSpec(NamedTuple):
  """One source.

  Attributes:
    kind: one of `KINDS`.
    rest: the text after the colon.
    weight: the share in the mixture, not normalised.
  """

  kind: str
  rest: str
  weight: float

  def __str__(self) -> str:
    return f"{self.kind}:{self.rest}" if self.rest else self.kind


def parse_sources(text: str) -> list[SourceSpec]:
  """The sources of a spec such as `0.7*text:novels/*.txt + 0.3*jsonl:books.jsonl#text`.

  Weights default to 1 and are relative. A path that contains ' + ' cannot be written.

  Raises:
    ValueError: a part is no spec; the message names it.
  """
  return [_parse_source(part.strip()) for part in text.split(" + ")]


def _parse_source(part: str) -> SourceSpec:
  weighted = re.match(r"([0-9.eE+-]+)\*", part)
  kind, _, rest = part[weighted.end() if weighted else 0 :].partition(":")
  if kind not in KINDS:
    raise ValueError(
      f"source {part!r}: kind {kind!r} is unknown; known: {', '.join(KINDS.values())}." + nearest(kind, KINDS)
    )
  if (kind == "python-sources") == bool(rest):
    raise ValueError(f"source {part!r}: write {KINDS[kind]}.")
  weight = weighted.group(1) if weighted else "1"
  try:
    number = float(weight)
  except ValueError:
    number = 0.0
  if not 0 < number < float("inf"):
    raise ValueError(f"source {part!r}: weight {weight!r} must be a positive number, as in 0.5*{kind}:….")
  return SourceSpec(kind, rest, number)
