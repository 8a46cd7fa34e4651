"""Saves a model, with its tokenizer if there is one, in the form that `from_pretrained` and `load` read."""

import os

from tokenformer_jax import data
from tokenformer_jax.interop.export import Exported, export
from tokenformer_jax.models.language_model import LanguageModel


def save(
  model: LanguageModel,
  path: str | os.PathLike,
  tokenizer: data.Tokenizer | None = None,
  *,
  dtype: str = "float32",
) -> Exported:
  """Writes a model, and its tokenizer beside it: a TokenFormer under the released names, other models as `export` does.

  A folder or a `.safetensors` file gives the model back as it is, with any τ that growth has left. A `.bin` file, which
  has no place for τ, gives a grown model back with more rows and the same function; see `export`.

      tf.save(model, "models/mine", tokenizer)
      model, tokenizer = tf.load("models/mine"), tf.load_tokenizer("models/mine")

  Args:
    model: a language model with float parameters.
    path: a folder, which gets a `model.safetensors`, or a file that ends in `.safetensors` or `.bin`; local or a URI.
      Existing files are not overwritten.
    tokenizer: the model's tokenizer; None writes none.
    dtype: `float32` (exact), `bfloat16` or `float16`.

  Returns:
    What was written.

  Raises:
    ValueError: an existing file, an unknown ending or dtype, a model that cannot be exported, or a tokenizer with more
      ids than the model.
  """
  if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"tokenizer with {tokenizer.vocab_size} ids, model with vocab_size={model.config.vocab_size}: "
      "give the model's own tokenizer."
    )
  return export(model, path, dtype=dtype, tokenizer=tokenizer)
