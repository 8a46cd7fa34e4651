"""Converts models between this project's form, the released PyTorch form and Hugging Face's.

  python -m tokenformer_jax.cli.convert --from=pytorch_model.bin --to=FOLDER
  python -m tokenformer_jax.cli.convert --from=WORKDIR --to=release/pytorch_model.bin

A TokenFormer's folder gets model.safetensors, which stores everything including τ. A .bin gives the same function in
the released code: a grown model gets more rows there, which do not change its outputs. A dense model that transformers
has as gpt_neox, gpt2 or llama is written as transformers writes it. config.json, a model card
(README.md) and the tokenizer are written beside the weights, and nothing is overwritten.
"""

from absl import flags

from tokenformer_jax.cli import command

_FROM = flags.DEFINE_string(
  "from", None, "Work folder, exported folder, .bin, .pt, .safetensors, DeepSpeed pipeline folder, or hub model."
)
_TO = flags.DEFINE_string("to", None, "A .bin, a .safetensors, or a folder for model.safetensors.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 (exact), bfloat16 or float16.")
_RELEASED = flags.DEFINE_bool(
  "released", None, "Whether a .safetensors gives the same function in the released code, too."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the work folder; the newest by default.")
_CONFIG = flags.DEFINE_string("config", None, "JSON file of the configuration, if the shapes do not determine it.")
flags.mark_flags_as_required(["from", "to"])


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered without delay.
  from tokenformer_jax.interop.convert import convert
  from tokenformer_jax.interop.weight_config import read_config

  config = None if _CONFIG.value is None else read_config(_CONFIG.value, "--config")
  exported = convert(
    _FROM.value, _TO.value, config=config, step=_STEP.value, dtype=_DTYPE.value, released=_RELEASED.value
  )
  print(f"{exported.path}: {exported.config.num_parameters:,} parameters, {_DTYPE.value}.")
  for field, rows in exported.rows_added.items():
    if rows:
      print(f"{rows} rows with zero values added to each layer's {field}, for the released code's τ = √N.")
  if exported.keeps_grown_tau:
    print(
      "The model was grown: the released code would use √N for its τ and give another function; use --released for it."
    )


if __name__ == "__main__":
  command.run(main)
