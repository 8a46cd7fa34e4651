"""A picture of a text that shows where a model routes its tokens: through which blocks, to which experts or groups.

    python -m experiments.routing --workdir=runs/mod --text="It was the best of times" --output=routing.png
    python -m experiments.routing --workdir=runs/mixtral --file=book.txt --tokens=512 --output=routing.png --html=routing.html

Each line of the picture is a part of the text, with a row for each layer that has a router, in the layer's colour. A cell
is filled where the token goes through the layer. With experts or groups it has the number of the first choice, and the more
solid the colour, the higher that number. The choices are those of evaluation and decoding, in which no token knows a later
one; experts that drop tokens in training drop none.
"""

import dataclasses
import html
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.figure
import numpy as np
from absl import flags

import tokenformer_jax as tf
from tokenformer_jax.cli import command
from tokenformer_jax.nn.depth_routing import RoutedBlock
from tokenformer_jax.nn.experts import Experts
from tokenformer_jax.nn.pattention import recorded_inputs
from tokenformer_jax.nn.token_groups import TokenGroups

COLOURS = list(matplotlib.colors.TABLEAU_COLORS.values())


@dataclasses.dataclass(frozen=True)
class Routes:
  """Where one layer sends the tokens of a text.

  Attributes:
    layer: the layer's index.
    goes: which tokens go through the layer, bool [T].
    chosen: the entries that each token chooses of the layer's router, int [T, k], −1 for a token that passes the layer by;
      None for a layer without experts and groups.
    entries: the number of entries of that router; 0 without one.
  """

  layer: int
  goes: np.ndarray
  chosen: np.ndarray | None
  entries: int


def routes_of(model: tf.LanguageModel, ids: np.ndarray) -> list[Routes]:
  """The layers of a model that have a router, with where they send the tokens `ids` [T].

  Raises:
    ValueError: the model has no router, or the text more tokens than the model reads at once.
  """
  config = model.config
  if not (config.depth.is_routed or config.ffn.has_router):
    raise ValueError(
      "the model has no router (depth.capacity=1.0, ffn.experts=1, ffn.group_tokens=0): every token goes everywhere."
    )
  if not 1 <= len(ids) <= config.seq_length:
    raise ValueError(f"the text has {len(ids)} tokens; give 1 to {config.seq_length} (seq_length).")
  observed = jax.device_get(jax.jit(lambda model, ids: model.through_layers(_observe, ids)[1])(model, ids[None]))
  entries = config.ffn.experts + config.ffn.no_ops
  if config.ffn.group_tokens:
    entries = config.ffn_tokens // config.ffn.group_tokens
  # The first block, where it differs, and then the members of each repetition.
  layers = [observed.pop("first")] if "first" in observed else []
  paths = sorted(observed, key=lambda path: int(path.rpartition("/")[2]) if "/" in path else 0)
  repeats = (config.num_layers - len(layers)) // len(paths)
  layers += [jax.tree.map(lambda leaf: leaf[i], observed[path]) for i in range(repeats) for path in paths]
  found = []
  for index, layer in enumerate(layers):
    if config.is_routed(index) or "chosen" in layer:
      chosen = layer.get("chosen")
      found.append(Routes(index, layer["goes"], chosen, 0 if chosen is None else entries))
  return found


def _observe(block, x, context):
  """Applies a block to one text: (x, its routes)."""
  goes = jnp.ones(x.shape[:2], bool)
  if isinstance(block, RoutedBlock):
    goes = block.goes_through(x, block.scores(x), context)
  with recorded_inputs() as recorded:
    x, _, _ = block(x, context.observed())
  found = {"goes": goes[0]}
  for layer, inputs in recorded:
    if isinstance(layer, (Experts, TokenGroups)):
      # A routed block has its tokens first, each part in its order.
      order = jnp.argsort(~goes[0], stable=True)
      chosen = jax.lax.top_k(layer.scores(inputs), layer.part.chosen)[1][0]
      found["chosen"] = jnp.where(goes[0][:, None], jnp.zeros_like(chosen).at[order].set(chosen), -1)
  return x, found


def strength(routes: Routes) -> np.ndarray:
  """How solid the colour of each token's cell is, from 0 to 1, [T]."""
  if routes.chosen is None:
    return routes.goes.astype(float)
  return np.where(routes.goes, 0.15 + 0.85 * (routes.chosen[:, 0] + 1) / routes.entries, 0.0)


def draw(all_routes: list[Routes], texts: list[str], path: pathlib.Path, width: int = 64) -> pathlib.Path:
  """Writes the picture, with `width` tokens in each line."""
  width = min(width, len(texts))
  lines = -(-len(texts) // width)
  figure = matplotlib.figure.Figure(
    figsize=(0.22 * width + 1, lines * (0.22 * len(all_routes) + 0.7)), layout="constrained"
  )
  for line, axes in enumerate(np.ravel(figure.subplots(lines, 1, squeeze=False))):
    part = slice(line * width, (line + 1) * width)
    for row, routes in enumerate(all_routes):
      colour = matplotlib.colors.to_rgb(COLOURS[routes.layer % len(COLOURS)])
      cells = [(*colour, alpha) for alpha in strength(routes)[part]]
      axes.imshow([cells], extent=(-0.5, len(cells) - 0.5, row + 0.5, row - 0.5), aspect="auto")
      for column, chosen in enumerate([] if routes.chosen is None else routes.chosen[part, 0]):
        if chosen >= 0:
          axes.text(column, row, str(chosen), fontsize=5, ha="center", va="center")
    shown = [shown_text(text) for text in texts[part]]
    axes.set_xticks(range(len(shown)), shown, fontsize=7, family="monospace", rotation=90 * (max(map(len, shown)) > 1))
    axes.set_yticks(range(len(all_routes)), [f"layer {routes.layer}" for routes in all_routes], fontsize=6)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(len(all_routes) - 0.5, -0.5)
    axes.tick_params(length=0)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
  return path


def shown_text(text: str) -> str:
  """A token as a label: white space visible, and what no font can show as a dot."""
  return "".join(c if c.isprintable() and not c.isspace() else {" ": "␣", "\n": "¶"}.get(c, "·") for c in text) or "·"


def write_html(all_routes: list[Routes], texts: list[str], path: pathlib.Path) -> pathlib.Path:
  """Writes the text as a page: under each token a bar for each layer, with what the layer does in the token's hint."""
  spans = []
  strengths = [strength(routes) for routes in all_routes]
  for index, text in enumerate(texts):
    bars, hints = [], []
    for routes, solid in zip(all_routes, strengths):
      colour = COLOURS[routes.layer % len(COLOURS)]
      bars.append(f'<i style="background:{colour};opacity:{solid[index]:.2f}"></i>')
      entries = "" if routes.chosen is None else f" {', '.join(map(str, routes.chosen[index]))}"
      hints.append(
        f"layer {routes.layer}:{entries or ' through'}" if routes.goes[index] else f"layer {routes.layer}: by"
      )
    spans.append(f'<span title="{html.escape("; ".join(hints))}">{html.escape(shown_text(text))}{"".join(bars)}</span>')
    if "\n" in text:
      spans.append("<br>")
  style = "span{display:inline-block;font-family:monospace;margin:2px 0}i{display:block;height:4px}"
  path.write_text(
    f'<!doctype html><meta charset="utf-8"><title>Routing</title><style>{style}</style>{"".join(spans)}\n'
  )
  return path


def main(argv):
  del argv
  args = flags.FLAGS
  if (args.text is None) == (args.file is None):
    raise ValueError(f"text={args.text!r}, file={args.file!r}: give exactly one of them.")
  model, tokenizer = tf.load(args.workdir), tf.load_tokenizer(args.workdir)
  text = args.text if args.file is None else pathlib.Path(args.file).read_text()
  ids = np.asarray(tokenizer.encode(text)[: min(args.tokens, model.config.seq_length)], np.int32)
  all_routes = routes_of(model, ids)
  texts = [tokenizer.decode([int(token)]) for token in ids]
  print(draw(all_routes, texts, pathlib.Path(args.output)))
  if args.html:
    print(write_html(all_routes, texts, pathlib.Path(args.html)))
  for routes in all_routes:
    share = f"layer {routes.layer}: {routes.goes.mean():.1%} of the tokens go through"
    counts = "" if routes.chosen is None else np.bincount(routes.chosen[routes.chosen >= 0], minlength=routes.entries)
    print(share + (f"; choices of each entry: {' '.join(map(str, counts))}" if len(counts) else ""))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Work folder of a training run.", required=True)
  flags.DEFINE_string("text", None, "The text; or --file.")
  flags.DEFINE_string("file", None, "A file whose first tokens are the text.")
  flags.DEFINE_integer("tokens", 256, "The most tokens of the text.", lower_bound=1)
  flags.DEFINE_string("output", "routing.png", "The picture.")
  flags.DEFINE_string("html", "", "A page with the same, with the choices of each token; by default none.")
  command.run(main)
