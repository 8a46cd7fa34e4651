"""Any corpus in, exact batches out: sources, tokenizers, packing, loader. No jax; imports `config` alone.

A source is one string, `config.data.source`; several with weights make a mixture, as in
`0.7*text:a/*.txt + 0.3*jsonl:b#text`:

    python-sources                       the running interpreter's standard library
    text:GLOB[#MARKER]                   plain or gzip files; documents are files, or parted by marker lines
    jsonl:GLOB#FIELD                     one JSON object a line, plain or gzip
    tokens:PATH[#DTYPE]                  a prepared folder, a Megatron/GPT-NeoX .bin + .idx, a nanoGPT .bin
    tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FEATURE]
    huggingface:NAME[,CONFIG][@SPLIT][#FIELD]

The way of the text: `sources` opens documents, `corpus` has them as ids and splits them into train and
held-out parts, `packing` makes rows of model inputs, `loader` shuffles, shares and stacks rows into batches.
Anything else with a length and rows (images, say) goes into the loader as it is: see `packing.Packer`.
"""

from tokenformer_jax.data.dataset import Data, open_data
from tokenformer_jax.data.fingerprint import check_same
from tokenformer_jax.data.loader import BatchIterator
from tokenformer_jax.data.packing import Batch
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer, save_tokenizer

__all__ = [
  "Batch",
  "BatchIterator",
  "Data",
  "Tokenizer",
  "check_same",
  "load_tokenizer",
  "open_data",
  "open_tokenizer",
  "save_tokenizer",
]
