"""Tokenizes a corpus once, into a folder that training reads as `tokens:FOLDER`; stopped, it goes on.

  python -m tokenformer_jax.cli.prepare --source='text:books/*.txt' --out=books_bpe --train_bpe=5000
  python -m tokenformer_jax.cli.train --config=… --config.data.source=tokens:books_bpe \\
      --config.data.tokenizer=books_bpe/tokenizer.json
"""

import tqdm
from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config import BAD_TEXTS
from tokenformer_jax.data.prepare import prepare, train_or_load_bpe
from tokenformer_jax.data.sources import open_documents
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.data.tokenizer_files import open_tokenizer

SOURCE = flags.DEFINE_string(
  "source",
  None,
  "One source of text: text:GLOB[#MARKER], jsonl:GLOB#FIELD, tfds:NAME, huggingface:NAME or python-sources.",
  required=True,
)
OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)
TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "bytes",
  "bytes, a tokenizer JSON, a folder with vocab.json and "
  "merges.txt, or a name on the Hugging Face hub; #TOKEN ends documents.",
)
TRAIN_BPE = flags.DEFINE_integer(
  "train_bpe", 0, "Learn a byte-level BPE with this many ids from the source, instead of --tokenizer.", lower_bound=0
)
BAD_TEXT = flags.DEFINE_enum("bad_text", "error", BAD_TEXTS, "What to do with text that cannot be read.")


def main(argv):
  del argv
  specs = parse_sources(SOURCE.value)
  if len(specs) > 1:
    raise ValueError(f"--source={SOURCE.value}: prepare each source of a mixture in a folder of its own.")
  source = open_documents(specs[0])
  total = source.size()
  if TRAIN_BPE.value:
    with _bar("learning a tokenizer", total) as bar:
      tokenizer = train_or_load_bpe(source, TRAIN_BPE.value, OUT.value, bad_text=BAD_TEXT.value, progress=bar.update)
  else:
    tokenizer = open_tokenizer(TOKENIZER.value)
  with _bar("tokenizing", total) as bar:
    manifest = prepare(source, tokenizer, OUT.value, bad_text=BAD_TEXT.value, progress=bar.update)
  print(
    f"{OUT.value}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes, "
    f"{manifest['tokens']:,} tokens, vocabulary {tokenizer.vocab_size:,} (padded "
    f"{tokenizer.padded_vocab_size:,}), {manifest['replaced']:,} byte sequences replaced, "
    f"{manifest['skipped']:,} documents left out."
  )


def _bar(title: str, total: int | None) -> tqdm.tqdm:
  return tqdm.tqdm(desc=title, total=total, unit="B", unit_scale=True)


if __name__ == "__main__":
  command.run(main)
