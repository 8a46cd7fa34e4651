"""Any corpus in, exact batches out: sources, tokenizers, packing, loader. No jax; imports `config` alone."""

from tokenformer_jax.data.dataset import Data, open_data
from tokenformer_jax.data.fingerprint import check_same
from tokenformer_jax.data.loader import BatchIterator
from tokenformer_jax.data.packing import Batch
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer, save_tokenizer

__all__ = ["Batch", "BatchIterator", "Data", "Tokenizer", "check_same", "load_tokenizer", "open_data",
           "open_tokenizer", "save_tokenizer"]
