"""Continues prompts with a trained model.

  python -m tokenformer_jax.cli.generate --workdir=DIR --prompt='def main(' --max_new_tokens=200

The continuation of a single prompt is printed while it is generated; those of several prompts (repeat --prompt) are
printed at the end. An empty prompt begins a document. A model that is too large for one device is split as in training:
--mesh.fsdp=4 --mesh.token=2.
"""

import sys

from absl import flags

from tokenformer_jax.cli import command, mesh_flags, process_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to load; by default the newest.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "Instead of --workdir: weights that tf.from_pretrained reads.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer of --pretrained; by default the one beside the weights.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat it for several prompts.", required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "The most tokens to generate after each prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token; higher temperatures are freer.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0 draws from all.")
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw from the fewest tokens with this probability together; 1 draws from all."
)
_REPETITION_PENALTY = flags.DEFINE_float(
  "repetition_penalty", 1.0, "Above 1, tokens that occurred before become less likely; 1 changes nothing."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
_INT8 = flags.DEFINE_bool("int8", False, "Round parameter tokens to int8: half of bfloat16's memory. Needs qwix.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text before which the continuation stops; repeat it for several.")
_DRAFT = flags.DEFINE_string(
  "draft", None, "Smaller model with the same tokenizer that drafts tokens: a work folder, weights or a hub name."
)
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "How many tokens --draft drafts at a time.")
_LOG_PROBS = flags.DEFINE_bool("log_probs", False, "Print each continuation's log-probability on stderr, in nats.")
mesh_flags.define()
process_flags.define()


def main(argv):
  del argv
  import tokenformer_jax as tf  # Imported only here, so that --help and a wrong flag are answered at once.
  from tokenformer_jax.evaluation.evaluate import open_model

  say = print if process_flags.start() else lambda *_, **__: None
  mesh = mesh_flags.mesh()
  source = _WORKDIR.value, _STEP.value, _PRETRAINED.value, _TOKENIZER.value
  model, tokenizer = open_model(*source, mesh=mesh)
  if _INT8.value:
    model = tf.int8_tokens(model)
  if hasattr(model, "for_decoding"):  # `generate` refuses others.
    model = model.for_decoding()  # The float32 parameters of the model are freed.

  prompts = _PROMPT.value
  beginning = iter((prompts[0],))  # It is printed with the first piece, after all mistakes have been reported.

  def stream(row, piece):
    say(next(beginning, "") + piece, end="", flush=True)

  results = tf.generate(
    model,
    tokenizer,
    prompts,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    repetition_penalty=_REPETITION_PENALTY.value,
    seed=_SEED.value,
    stop=_STOP.value,
    stream=stream if len(prompts) == 1 else None,
    draft=None if _DRAFT.value is None else tf.from_pretrained(_DRAFT.value, mesh=mesh),
    draft_tokens=_DRAFT_TOKENS.value,
    return_log_probs=True,
  )
  if len(prompts) == 1:
    say(next(beginning, ""))
  else:
    say("\n----\n".join(prompt + result.text for prompt, result in zip(prompts, results)))
  if _LOG_PROBS.value:
    for result in results:
      say(f"log-probability: {sum(result.log_probs):.3f} nats over {len(result.ids)} tokens", file=sys.stderr)


if __name__ == "__main__":
  command.run(main)
