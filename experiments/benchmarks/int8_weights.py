"""Weight-only int8 for the parameter tokens: what it costs in perplexity, and in time on this machine.

    python experiments/benchmarks/int8_weights.py --workdir=runs/novels --text='text:test.txt.gz#<|endoftext|>'

Needs qwix. Keys get a scale for each token and values one for each output channel, which both leave the product as it
is and scale its result; embedding, norm and τ stay. The perplexity is that of the first `--tokens` ids, with weights
that were rounded and written back; the times are of a product of one row with as many parameter tokens in either form.
"""

import statistics
import time

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import qwix

import tokenformer_jax as tf
from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.evaluation.perplexity import perplexity
from tokenformer_jax.nn.parameters import split

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of a trained model.", required=True)
_TEXT = flags.DEFINE_string("text", None, "Source of the text.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 100_000, "Ids scored.")
_TIMED = dict(tokens=3072, channels=768, arrays=12, rounds=15)


def rounded(model, bits):
  """The model with keys and values that `bits` bits can hold."""
  def round_one(path, leaf):
    kept = {"keys": -2, "values": -1}.get(path[-1].key)
    if kept is None:
      return leaf
    # Of each layer for itself.
    quantized = qwix.quantize(leaf, f"int{bits}", channelwise_axes=(0, leaf.ndim + kept))
    return qwix.dequantize(quantized).astype(leaf.dtype)
  graphdef, parameters, tau = split(model)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(round_one, parameters), tau)


def times():
  """Median milliseconds of one product with float32 and with int8 keys."""
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=(_TIMED["tokens"], _TIMED["channels"])), jnp.float32)
            for _ in range(_TIMED["arrays"])]
  row = jnp.asarray(rng.normal(size=(1, _TIMED["channels"])), jnp.float32)
  sides = {"float32": (jnp.einsum, arrays),
           "int8": (qwix.einsum, [qwix.quantize(a, jnp.int8, channelwise_axes=(0,)) for a in arrays])}
  run = {name: jax.jit(lambda keys, einsum=einsum: [einsum("md,nd->mn", row, k) for k in keys])
         for name, (einsum, _) in sides.items()}
  seconds = {name: [] for name in sides}
  for _ in range(1 + _TIMED["rounds"]):
    for name, (_, keys) in sides.items():
      begin = time.perf_counter()
      jax.block_until_ready(run[name](keys))
      seconds[name].append(time.perf_counter() - begin)
  return {name: 1e3 * statistics.median(taken[1:]) / _TIMED["arrays"] for name, taken in seconds.items()}


def main(argv):
  del argv
  model, tokenizer = tf.load(_WORKDIR.value), tf.load_tokenizer(_WORKDIR.value)
  (spec,) = parse_sources(_TEXT.value)
  whole = open_corpus(spec, tokenizer)
  size = min(_TOKENS.value, len(whole.tokens))
  corpus = Corpus(whole.read(0, size), np.array([size]), whole.keys[:1], whole.identity, whole.name)
  print("| parameter tokens | perplexity a token |\n|---|---|")
  for name, each in {"float32": model, "int8": rounded(model, 8), "int4": rounded(model, 4)}.items():
    print(f"| {name} | {perplexity(each, tokenizer, corpus, progress=None).report()['token_perplexity']:.4f} |", flush=True)
  print(f"\nA row by {_TIMED['tokens']} × {_TIMED['channels']} keys on {jax.devices()[0].device_kind}: "
        + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times().items()))


if __name__ == "__main__":
  app.run(main)
