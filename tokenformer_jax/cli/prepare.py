"""Tokenizes a corpus once, into a folder that training reads as `tokens:FOLDER`; a run that was stopped is resumed.

  python -m tokenformer_jax.cli.prepare --source='text:books/*.txt' --out=books_bpe --train_bpe=5000
  python -m tokenformer_jax.cli.train --config=… --config.data.source=tokens:books_bpe \\
      --config.data.tokenizer=books_bpe/tokenizer.json

Several processes or machines can share the work, each with a part of the documents; the last command joins the parts:

  python -m tokenformer_jax.cli.prepare --source='text:books/*.txt' --out=books --tokenizer=gpt2 --part=1/2
  python -m tokenformer_jax.cli.prepare --source='text:books/*.txt' --out=books --tokenizer=gpt2 --part=2/2
  python -m tokenformer_jax.cli.prepare --out=books --merge
"""

import re

from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config.data import BAD_TEXTS, SPECIAL_TOKENS
from tokenformer_jax.data.prepare import prepare
from tokenformer_jax.data.prepared_bpe import train_or_load_bpe
from tokenformer_jax.data.prepared_parts import merge_parts
from tokenformer_jax.data.sources import open_documents
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.data.tokenizer_files import open_tokenizer
from tokenformer_jax.progress import Progress

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "One source of text: text:GLOB[#MARKER], jsonl:GLOB#FIELD, tfds:NAME, huggingface:NAME or python-sources.",
)
_OUT = flags.DEFINE_string("out", None, "The folder to write, on a local disk.", required=True)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "bytes",
  "bytes, a tokenizer JSON, a folder with vocab.json and merges.txt, or a name on the Hugging Face hub; #TOKEN names "
  "the token that ends documents.",
)
_SPECIAL_TOKENS = flags.DEFINE_enum(
  "special_tokens",
  None,
  SPECIAL_TOKENS,
  "What the name of a special token means inside a document: its special id (recognise, the default), or text.",
)
_TRAIN_BPE = flags.DEFINE_integer(
  "train_bpe", 0, "Train a byte-level BPE with this many ids on the source, instead of --tokenizer.", lower_bound=0
)
_BAD_TEXT = flags.DEFINE_enum("bad_text", "error", BAD_TEXTS, "What to do with text that cannot be read.")
_PART = flags.DEFINE_string("part", None, "i/n: tokenize every n-th document from the i-th on, for --merge to join.")
_MERGE = flags.DEFINE_boolean("merge", False, "Join the parts in --out, which --part=1/n to n/n wrote.")


def main(argv):
  del argv
  if _MERGE.value:
    if _SOURCE.value or _PART.value or _TRAIN_BPE.value:
      raise ValueError("--merge: the parts say what they were made from; give --out alone.")
    with Progress(None, "tokens", title="merging", seconds=30) as progress:
      manifest = merge_parts(_OUT.value, progress=progress.update)
    print(_summary(manifest))
    return
  source = _source()
  part = _parse_part()
  total = source.size()
  if _TRAIN_BPE.value:
    if part:
      raise ValueError("--part with --train_bpe: train the BPE once, and give its tokenizer.json to all parts.")
    with Progress(total, "bytes", title="training a tokenizer", seconds=30) as progress:
      tokenizer = train_or_load_bpe(
        source,
        _TRAIN_BPE.value,
        _OUT.value,
        bad_text=_BAD_TEXT.value,
        special_tokens=_SPECIAL_TOKENS.value or SPECIAL_TOKENS[0],
        progress=progress.update,
      )
  else:
    tokenizer = open_tokenizer(_TOKENIZER.value, _SPECIAL_TOKENS.value)
  if part and total is not None:
    total //= part[1]
  with Progress(total, "bytes", title="tokenizing", seconds=30) as progress:
    manifest = prepare(source, tokenizer, _OUT.value, bad_text=_BAD_TEXT.value, part=part, progress=progress.update)
  print(_summary(manifest), f"Vocabulary {tokenizer.vocab_size:,} (padded {tokenizer.padded_vocab_size:,}).")


def _source():
  if not _SOURCE.value:
    raise ValueError("--source: name one source of text, as in --source='text:books/*.txt'.")
  specs = parse_sources(_SOURCE.value)
  if len(specs) > 1:
    raise ValueError(f"--source={_SOURCE.value}: prepare each source of a mixture in a folder of its own.")
  return open_documents(specs[0])


def _parse_part() -> tuple[int, int] | None:
  if _PART.value is None:
    return None
  match = re.fullmatch(r"(\d+)/(\d+)", _PART.value)
  if not match:
    raise ValueError(f"--part={_PART.value}: write i/n, as in --part=1/8.")
  return int(match[1]), int(match[2])


def _summary(manifest: dict) -> str:
  return (
    f"{_OUT.value}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes, {manifest['tokens']:,} tokens, "
    f"{manifest['replaced']:,} byte sequences replaced, {manifest['skipped']:,} documents left out."
  )


if __name__ == "__main__":
  command.run(main)
