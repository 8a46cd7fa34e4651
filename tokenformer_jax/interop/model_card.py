"""The README.md beside an export: what the model is, how to load it, where it comes from."""

import dataclasses
import json
import os
import pathlib

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.interop.pretrained import is_work_folder

# Our field -> the one of the released code's YAML files.
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
  source: str | os.PathLike = "",
  step: int | None = None,
) -> str:
  """The card's Markdown; the arguments are those of `export`."""
  parts = [
    f"# TokenFormer, {config.num_parameters:,} parameters",
    "A language model whose linear layers are attention over parameter tokens (arXiv 2410.23168), "
    "written by tokenformer_jax.",
  ]
  if source:
    parts.append(f"Exported from `{source}`{'' if step is None else f', step {step}'}.")
  code = f'import tokenformer_jax as tf\n\nmodel = tf.from_pretrained("{file_name}")'
  parts += [
    f"## Load it\n\n```python\n{code}\n```",
    _tau_account(config, dtype, released, rows_added),
    "## Configuration\n\n" + _table(dataclasses.asdict(config)),
  ]
  if released:
    yaml = {theirs: getattr(config, ours) for ours, theirs in _RELEASED_FIELDS.items()}
    parts.append("The same for the released PyTorch code:\n\n" + _table(yaml))
  if is_work_folder(source):
    parts += _run_account(source, step)
  return "\n\n".join(parts) + "\n"


def _tau_account(config: ModelConfig, dtype: str, released: bool, rows_added: dict[str, int]) -> str:
  """How the file's arrays are to be read: names, type, τ."""
  names = f"Arrays have the released names and are {dtype}."
  if not released:
    return (
      f"{names} The scale τ inside Θ is in the file's metadata; the released PyTorch code does not "
      "read it and takes √N, which is another function if the model was grown."
    )
  added = [f"{rows} to each of {field}" for field, rows in rows_added.items() if rows]
  if not added:
    return f"{names} They run unchanged in the released PyTorch code."
  return (
    f"{names} They run unchanged in the released PyTorch code, whose τ is always √N: for that the "
    f"export added rows with zero values ({', '.join(added)}), which change no output."
  )


def _run_account(workdir: str | os.PathLike, step: int | None) -> list[str]:
  """Data and metrics of the run, as far as its folder tells."""
  from tokenformer_jax.training.run_log import read_metrics  # A room above this one, for this case alone.

  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return []
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: broken ({error}); the card needs it to tell the run's data.") from None
  run = Config.from_dict(fields)
  parts = ["## Data\n\n" + _table(dataclasses.asdict(run.data))]
  evaluated = [
    row for row in read_metrics(str(workdir)) if "held_out/loss" in row and (step is None or row["step"] <= step)
  ]
  if evaluated:
    parts.append(
      f"## Metrics\n\nHeld-out loss {evaluated[-1]['held_out/loss']:.4f} nats a token after "
      f"{evaluated[-1]['step']:,} updates."
    )
  return parts


def _table(fields: dict) -> str:
  rows = [f"| {name} | {value} |" for name, value in fields.items()]
  return "\n".join(["| field | value |", "|---|---|", *rows])
