"""Continues prompts with a trained model.

  python -m tokenformer_jax.cli.generate --workdir=DIR --prompt='def main(' --max_new_tokens=200

One prompt is written to the terminal as it comes; several (repeat --prompt) are printed at the end.
"""

import os

from absl import flags

from tokenformer_jax.cli import command, process_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; by default the newest.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "In its place: weights that tf.from_pretrained reads.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of --pretrained; by default the one beside it.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat for several.", required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "The most tokens to write after each prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token; higher is freer.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of this probability; 1: from all.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed writes the same text.")
_INT8 = flags.DEFINE_bool("int8", False, "Parameter tokens in int8: half of bfloat16's memory. Needs qwix.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text before which to stop; repeat for several.")
process_flags.define()


def main(argv):
  del argv
  import tokenformer_jax as tf  # Here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.data import open_tokenizer
  from tokenformer_jax.interop.pretrained import from_pretrained

  if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
    raise ValueError("give either --workdir or --pretrained.")
  say = print if process_flags.start() else lambda *_, **__: None
  if _WORKDIR.value is not None:
    model, tokenizer = tf.load(_WORKDIR.value, step=_STEP.value), tf.load_tokenizer(_WORKDIR.value)
  else:
    folder = os.path.dirname(_PRETRAINED.value) if os.path.isfile(_PRETRAINED.value) else _PRETRAINED.value
    model, tokenizer = from_pretrained(_PRETRAINED.value), open_tokenizer(_TOKENIZER.value or folder or ".")

  prompts = _PROMPT.value
  beginning = iter((prompts[0],))  # Printed with the first piece, after whatever may be wrong is told.

  def stream(row, piece):
    say(next(beginning, "") + piece, end="", flush=True)

  if _INT8.value:
    model = tf.int8_tokens(model)
  texts = tf.generate(
    model.for_decoding(),
    tokenizer,
    prompts,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
    stop=_STOP.value,
    stream=stream if len(prompts) == 1 else None,
  )
  if len(prompts) == 1:
    say(next(beginning, ""))
  else:
    say("\n----\n".join(prompt + text for prompt, text in zip(prompts, texts)))


if __name__ == "__main__":
  command.run(main)
