"""Converts models between this project's and the released PyTorch form.

  python -m tokenformer_jax.cli.convert --from=pytorch_model.bin --to=FOLDER
  python -m tokenformer_jax.cli.convert --from=WORKDIR --to=release/pytorch_model.bin

A folder gets model.safetensors, which keeps everything, τ too. A .bin is right in the released code: a
model that was grown gets rows there that change nothing but its form. config.json and a model card
(README.md) are written beside either, and nothing is overwritten.
"""

from absl import flags

from tokenformer_jax.cli import command

_FROM = flags.DEFINE_string("from", None, "Work folder, exported folder, .bin, .safetensors, or hub model.")
_TO = flags.DEFINE_string("to", None, "A .bin, a .safetensors, or a folder for model.safetensors.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 (exact) or bfloat16.")
_RELEASED = flags.DEFINE_bool("released", None, "Make a .safetensors right in the released code too.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the work folder; by default the newest.")
_CONFIG = flags.DEFINE_string("config", None, "JSON of the configuration, where shapes do not tell it.")
flags.mark_flags_as_required(["from", "to"])


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.interop.export import export
  from tokenformer_jax.interop.pretrained import from_pretrained, is_work_folder
  from tokenformer_jax.interop.weight_config import read_config
  from tokenformer_jax.training.checkpoints import load

  config = read_config(_CONFIG.value) if _CONFIG.value else None
  workdir = _FROM.value if is_work_folder(_FROM.value) else None
  if _STEP.value is not None and not workdir:
    raise ValueError(f"--step={_STEP.value}: {_FROM.value} is no work folder and has no steps; leave it out.")
  model = load(workdir, _STEP.value) if workdir and config is None else from_pretrained(_FROM.value, config)
  exported = export(
    model, _TO.value, dtype=_DTYPE.value, released=_RELEASED.value, source=_FROM.value, step=_STEP.value
  )
  print(f"{exported.path}: {exported.config.num_parameters:,} parameters, {_DTYPE.value}.")
  for field, rows in exported.rows_added.items():
    if rows:
      print(f"{rows} rows with zero values added to each layer's {field}, for the released code's τ = √N.")
  if exported.keeps_grown_tau:
    print("Grown: the released code would take √N for its τ and be another function; for it, use --released.")


if __name__ == "__main__":
  command.run(main)
