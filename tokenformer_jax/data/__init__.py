"""Turns any corpus into exact batches: sources, tokenizers, packing, loader. Imports no jax.

A source is one string, `config.data.source`. Several sources with weights make a mixture, as in
`0.7*text:a/*.txt + 0.3*jsonl:b#text`:

    python-sources                       the running interpreter's standard library
    text:GLOB[#MARKER]                   text files; documents are files, or the text between marker lines
    jsonl:GLOB#FIELD                     JSON lines; documents are the text in one field
    tokens:PATH[#DTYPE]                  a prepared folder or files of token ids, see `token_files.open_tokens`
    tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FEATURE]
    huggingface:NAME[,CONFIG][@SPLIT][#FIELD]

Models of images read `idx:FOLDER[@SPLIT]`, `npz:FILE`, `folder:FOLDER` and `tfds:NAME[/CONFIG][:VERSION][@SPLIT]`, see
`image_sources`.
A classifier of texts reads one task of GLUE, `glue:FOLDER/TASK[@SPLIT]` or `tfds:glue/TASK[@SPLIT]` (see `glue`).
`run_data` chooses what a run reads by what its model is for, and `batches` has the arrays that each task reads.

Files of `text` and `jsonl` are plain or compressed (gzip, bzip2, xz, zstd), and `~` in a path is the home folder.
`sources` opens documents, `corpus` holds them as ids and splits them into training and held-out parts, `packing` makes
rows of model inputs, and `loader` shuffles, shares and stacks rows into batches. Anything else with a length and rows
goes into the loader directly: see `packing.Packer`.
"""

from tokenformer_jax.data.batches import Batch, ClassBatch, MaskedBatch
from tokenformer_jax.data.dataset import Data, open_data
from tokenformer_jax.data.fingerprint import check_same
from tokenformer_jax.data.loader import BatchIterator
from tokenformer_jax.data.run_data import RunData, empty_batch, open_run_data
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.data.tokenizer_files import load_tokenizer, open_tokenizer, save_tokenizer

__all__ = [
  "Batch",
  "BatchIterator",
  "ClassBatch",
  "Data",
  "MaskedBatch",
  "RunData",
  "Tokenizer",
  "check_same",
  "empty_batch",
  "load_tokenizer",
  "open_data",
  "open_run_data",
  "open_tokenizer",
  "save_tokenizer",
]
