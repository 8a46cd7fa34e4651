"""Converts a model from any form that can be read to any form that can be written."""

import os

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.export import Exported, export
from tokenformer_jax.interop.hub import local_path
from tokenformer_jax.interop.pretrained import from_pretrained, is_work_folder
from tokenformer_jax.paths import user_path


def convert(
  source: str | os.PathLike,
  path: str | os.PathLike,
  *,
  config: ModelConfig | None = None,
  step: int | None = None,
  dtype: str = "float32",
  released: bool | None = None,
) -> Exported:
  """Loads the model in `source` and exports it to `path`, with its tokenizer and a model card.

  Args:
    source: a work folder, or what `from_pretrained` reads.
    path: what `export` writes: a `.bin`, a `.safetensors` or a folder.
    config: the model's configuration, if shapes do not determine it.
    step: the checkpoint of a work folder, None for its newest.
    dtype: `float32` (exact), `bfloat16` or `float16`.
    released: whether a `.safetensors` must give the same function in the released code.

  Returns:
    What was written.

  Raises:
    ValueError: the source cannot be read or the target cannot be written (see `from_pretrained` and `export`), or a
      step is given for a source without steps.
  """
  user_path(path, "--to")  # A mistake here is reported before the model is read.
  folder = local_path(source, "--from")
  if step is None:
    model = from_pretrained(folder, config)
  elif not is_work_folder(folder):
    raise ValueError(f"--step={step}: {os.fspath(source)!r} is not a work folder and has no steps; leave it out.")
  else:
    # `training` may import this package, which therefore imports it only in this case.
    from tokenformer_jax.training.checkpoints import load

    model = load(str(folder), step)
  return export(model, path, dtype=dtype, released=released, source=source, step=step)
