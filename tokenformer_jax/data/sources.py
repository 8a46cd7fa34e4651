"""From a source spec to a corpus."""

from tokenformer_jax.data import documents
from tokenformer_jax.data.corpus import Corpus, tokenize
from tokenformer_jax.data.spec import SourceSpec
from tokenformer_jax.data.tokenizer import Tokenizer


def open_documents(spec: SourceSpec) -> documents.DocumentSource:
  """The documents of a source of text; ValueError where there are none to be had."""
  if spec.kind == "python-sources":
    return documents.python_sources()
  if spec.kind == "text":
    return documents.text_files(spec.rest)
  if spec.kind == "jsonl":
    return documents.jsonl_files(spec.rest)
  raise ValueError(f"source {spec}: holds no text to tokenize.")


def open_corpus(spec: SourceSpec, tokenizer: Tokenizer, bad_text: str = "error") -> Corpus:
  """The source's token ids: token files are mapped, anything else is tokenized into memory."""
  return tokenize(open_documents(spec), tokenizer, bad_text)
