"""Parameter tokens in int8: their cost in perplexity, in time on this machine, and in bytes on chips that are not present.

    python experiments/benchmarks/int8_weights.py --workdir=runs/novels --text='text:test.txt.gz#<|endoftext|>'
    python experiments/benchmarks/int8_weights.py --topology=v5e:1x1

Needs qwix. The perplexity is that of the first `--tokens` ids. The times are of `pattention` for one row, with equally many
parameter tokens in both forms. With a topology, whose compiler must be installed, decode steps of the 150M model are
compiled. The table then has the bytes that a step reads at least (its arguments) and the memory that it holds in addition,
which would show it if the keys were written out in bfloat16.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.distributed.axes import replicated
from tokenformer_jax.distributed.topologies import kept_out_of_the_cache, parse_topology, slice_mesh
from tokenformer_jax.evaluation.perplexity import perplexity
from tokenformer_jax.inference.decoding import decoding_programs
from tokenformer_jax.inference.int8 import int8_tokens
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.parameters import split

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a trained model.")
_TEXT = flags.DEFINE_string("text", None, "Source of the text.")
_TOKENS = flags.DEFINE_integer("tokens", 100_000, "Number of ids to score.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip to compile for, such as v5e:1x1 or h200:1.")
_TIMED = dict(num_tokens=3072, channels=768, layers=12, rounds=15)
FORMS = {"as they are": lambda model: model, "int8": int8_tokens}


def print_perplexities():
  model, tokenizer = tf.load(_WORKDIR.value), tf.load_tokenizer(_WORKDIR.value)
  (spec,) = parse_sources(_TEXT.value)
  whole = open_corpus(spec, tokenizer)
  size = min(_TOKENS.value, len(whole.tokens))
  corpus = Corpus(whole.read(0, size), np.array([size]), whole.keys[:1], whole.identity, whole.name)
  print("| parameter tokens | perplexity a token |\n|---|---|")
  for name, form in FORMS.items():
    found = perplexity(form(model), tokenizer, corpus, progress=None).report()
    print(f"| {name} | {found['token_perplexity']:.4f} |", flush=True)


def print_times():
  """Returns the median milliseconds of one layer."""

  class Layers(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List(
        tf.Pattention(_TIMED["channels"], _TIMED["channels"], _TIMED["num_tokens"], rngs=rngs)
        for _ in range(_TIMED["layers"])
      )

  models = {name: split(form(Layers(nnx.Rngs(0)))) for name, form in FORMS.items()}
  runs = {
    name: jax.jit(lambda leaves, x, graphdef=graphdef: [layer(x) for layer in nnx.merge(graphdef, *leaves).layers])
    for name, (graphdef, *_) in models.items()
  }
  row = jax.random.normal(jax.random.key(0), (1, _TIMED["channels"]))
  seconds = {name: [] for name in FORMS}
  for _ in range(1 + _TIMED["rounds"]):
    for name, (_, *leaves) in models.items():
      begin = time.perf_counter()
      jax.block_until_ready(runs[name](leaves, row))
      seconds[name].append(time.perf_counter() - begin)
  print(
    f"\nA row through {_TIMED['num_tokens']} tokens of {_TIMED['channels']} channels on {jax.devices()[0].device_kind}: "
    + ", ".join(
      f"{name} {1e3 * statistics.median(taken[1:]) / _TIMED['layers']:.2f} ms" for name, taken in seconds.items()
    )
  )


def print_bytes():
  config = tf.ModelConfig.named("150m", compute_dtype="bfloat16")
  chip, _ = parse_topology(_TOPOLOGY.value)
  mesh = slice_mesh(MeshConfig(), _TOPOLOGY.value)
  print("| rows | parameter tokens | reads, MB | at the memory's rate, ms | holds besides, MB |\n" + "|---" * 5 + "|")
  for rows in (1, 8):
    for name, form in FORMS.items():
      graphdef, *leaves = split(form(tf.LanguageModel(config, rngs=nnx.Rngs(0))).for_decoding())
      cache = jax.eval_shape(lambda: KVCache.empty(config, jnp.zeros(rows, jnp.int32), 256))
      given = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        (leaves, jax.ShapeDtypeStruct((rows,), jnp.int32), cache),
      )
      with kept_out_of_the_cache():
        _, decode_step = decoding_programs(graphdef, mesh)
        compiled = decode_step.lower(*given).compile()
      memory = compiled.memory_analysis()
      print(
        f"| {rows} | {name} | {memory.argument_size_in_bytes / 1e6:.0f} "
        f"| {1e3 * memory.argument_size_in_bytes / chip.memory_bandwidth:.3f} | {memory.temp_size_in_bytes / 1e6:.1f} |"
      )


def main(argv):
  del argv
  if _TOPOLOGY.value:
    jax.config.update("jax_platforms", "cpu")  # The devices of this machine are not the ones to compile for.
    print_bytes()
  else:
    print_perplexities()
    print_times()


if __name__ == "__main__":
  app.run(main)
