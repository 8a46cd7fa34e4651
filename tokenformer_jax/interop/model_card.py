"""The README.md beside an exported model: what the model is, how to load it, and where it comes from."""

import dataclasses
import json
import os

from etils import epath

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.interop.names import has_released_form
from tokenformer_jax.interop.pretrained import is_work_folder
from tokenformer_jax.models.model_class import model_class

# Our field -> the name of the same field in the released code's YAML files.
_RELEASED_FIELDS = {
  "num_layers": "num_layers",
  "hidden_size": "hidden_size",
  "num_heads": "num_attention_heads",
  "seq_length": "seq_length",
  "qkv_tokens": "qkv_slot_num",
  "proj_tokens": "proj_slot_num",
  "ffn_tokens": "ffn_slot_num",
  "theta": "norm_activation_type",
  "rotary_fraction": "rotary_pct",
  "rotary_base": "rotary_emb_base",
}


def model_card(
  config: ModelConfig,
  file_name: str,
  *,
  dtype: str,
  released: bool,
  rows_added: dict[str, int],
  architecture: str | None = None,
  source: str | os.PathLike = "",
  folder: epath.Path | None = None,
  step: int | None = None,
) -> str:
  """Returns the Markdown of the card.

  Args:
    config: the configuration of the model in the file.
    file_name: the weight file's name.
    dtype, released, source, step: the arguments of `export`.
    rows_added: the number of rows added to each layer for the released code's τ, by field.
    architecture: the class of transformers whose names the arrays have; None for other models.
    folder: where the files of `source` are, None without a source.

  Raises:
    ValueError: the work folder `source` has a broken config.json.
  """
  kind = "Language model" if config.is_causal else model_class(config).__name__
  description = f"A {kind[0].lower() + kind[1:] if config.is_causal else kind}, written by tokenformer_jax."
  names = f"Arrays have the paths of the parameters in tokenformer_jax, which alone reads them, and are {dtype}."
  if architecture is not None:
    kind = architecture
    names = f"Arrays have the names of transformers and are {dtype}: `transformers.{architecture}` reads the folder."
  elif has_released_form(config):
    kind, names = "TokenFormer", _tau_description(config, dtype, released, rows_added)
    description = (
      "A language model whose linear layers are attention over parameter tokens (arXiv 2410.23168), "
      "written by tokenformer_jax."
    )
  parts = [f"# {kind}, {config.num_parameters:,} parameters", description]
  if source:
    parts.append(f"Exported from `{source}`{'' if step is None else f', step {step}'}.")
  code = f'import tokenformer_jax as tf\n\nmodel = tf.from_pretrained("{file_name}")'
  parts += [
    f"## Load it\n\n```python\n{code}\n```",
    names,
    "## Configuration\n\n" + _table(dataclasses.asdict(config)),
  ]
  if released:
    yaml = {theirs: getattr(config, ours) for ours, theirs in _RELEASED_FIELDS.items()}
    parts.append("The same for the released PyTorch code:\n\n" + _table(yaml))
  if folder is not None and is_work_folder(folder):
    parts += _run_description(folder, step)
  return "\n\n".join(parts) + "\n"


def _tau_description(config: ModelConfig, dtype: str, released: bool, rows_added: dict[str, int]) -> str:
  """The names and type of the file's arrays, and how τ is stored."""
  names = f"Arrays have the released names and are {dtype}."
  if not released:
    return (
      f"{names} The scale τ inside Θ is in the file's metadata. The released PyTorch code does not "
      "read it and uses √N, which gives another function if the model was grown."
    )
  added = [f"{rows} to each of {field}" for field, rows in rows_added.items() if rows]
  if not added:
    return f"{names} They run unchanged in the released PyTorch code."
  return (
    f"{names} They run unchanged in the released PyTorch code, whose τ is always √N: for this the "
    f"export added rows with zero values ({', '.join(added)}), which do not change the outputs."
  )


def _run_description(workdir: epath.Path, step: int | None) -> list[str]:
  """The data and metrics of the run, as far as its folder has them."""
  # `training` may import this package, which therefore imports it only in this case.
  from tokenformer_jax.training.objective import objective_of
  from tokenformer_jax.training.run_log import read_metrics

  path = workdir / "config.json"
  if not path.exists():
    return []
  try:
    fields = json.loads(path.read_bytes())  # From bytes, so that a byte-order mark is accepted.
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: broken ({error}); the model card needs it to describe the run's data.") from None
  run = Config.from_dict(fields)
  parts = ["## Data\n\n" + _table(dataclasses.asdict(run.data))]
  evaluated = [
    row for row in read_metrics(str(workdir)) if "held_out/loss" in row and (step is None or row["step"] <= step)
  ]
  if evaluated:
    parts.append(
      f"## Metrics\n\nHeld-out loss {evaluated[-1]['held_out/loss']:.4f} {objective_of(run.model).unit} after "
      f"{evaluated[-1]['step']:,} updates."
    )
  return parts


def _table(fields: dict) -> str:
  rows = [f"| {name} | {value} |" for name, value in fields.items()]
  return "\n".join(["| field | value |", "|---|---|", *rows])
