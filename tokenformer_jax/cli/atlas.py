"""Writes a page that shows what each parameter token of a language model knows.

    python -m tokenformer_jax.cli.atlas --workdir=runs/novels --data=text:book.txt --output=atlas.html

The page is one file that any browser opens without a network. For each layer it has a map of the tokens by use, a
search, and for each token the contexts of the text in which its weight is largest, the ids whose logits its value
raises and lowers, the tokens with similar keys, and the growth that added it.
"""

from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config.data import BAD_TEXTS

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run; by default the newest.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "Weight file, folder or hub name, instead of --workdir.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "With --pretrained: the tokenizer; by default the one beside it.")
_DATA = flags.DEFINE_string("data", None, "Source of the text, e.g. text:GLOB.", required=True)
_BAD_TEXT = flags.DEFINE_enum("bad_text", "error", BAD_TEXTS, "What to do with text that cannot be read.")
_SEQUENCES = flags.DEFINE_integer("sequences", 1000, "Rows of the text to read, evenly over it.", lower_bound=1)
_SEQ_LENGTH = flags.DEFINE_integer("seq_length", 128, "Ids in a row.", lower_bound=1)
_CONTEXTS = flags.DEFINE_integer("contexts", 4, "Contexts to show of each parameter token.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "atlas.html", "File to write.")


def main(argv):
  del argv
  from tokenformer_jax.atlas.atlas import atlas
  from tokenformer_jax.atlas.births import births
  from tokenformer_jax.data.sources import open_corpus
  from tokenformer_jax.data.spec import parse_sources
  from tokenformer_jax.evaluation.evaluate import open_model
  from tokenformer_jax.paths import replace_text, user_path

  sources = parse_sources(_DATA.value)
  if len(sources) != 1:
    raise ValueError(f"data={_DATA.value!r}: names {len(sources)} sources; give one.")
  output = user_path(_OUTPUT.value, "output")
  if not output.parent.is_dir():
    raise ValueError(f"output={_OUTPUT.value!r}: its folder does not exist; make it first.")
  model, tokenizer = open_model(_WORKDIR.value, _STEP.value, _PRETRAINED.value, _TOKENIZER.value)
  page = atlas(
    model,
    tokenizer,
    open_corpus(sources[0], tokenizer, _BAD_TEXT.value),
    title=f"{_WORKDIR.value or _PRETRAINED.value} on {_DATA.value}",
    sequences=_SEQUENCES.value,
    seq_length=min(_SEQ_LENGTH.value, model.config.seq_length),
    contexts=_CONTEXTS.value,
    births=births(_WORKDIR.value, _STEP.value) if _WORKDIR.value is not None else None,
  )
  replace_text(output, page)
  print(f"{output}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
  command.run(main)
