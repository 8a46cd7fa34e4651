"""Decoding speed of the 150M model, compared with reading its weights once and with Hugging Face's GPT-NeoX of that size.

    python experiments/benchmarks/decode.py --batch_size=1 [--rounds=5] [--huggingface] [--temperature=1 --top_p=0.9]

Weights are random, in float32 by default. Prompts have 128 tokens, followed by 128 new ones, the likeliest or drawn. The
*limit* is the time of one jitted sum over the same weights and cache leaves, which every step has to read. Rounds
alternate; the figures are medians. With `--room=1024` up to 1,024 new tokens are asked for, and the cache is measured with all
of its slots from the start as well as doubled when it is full. `--huggingface` needs PyTorch and transformers, and takes the shape of Pythia 160M (the
same matrices: 12 layers of 12 · 768² parameters) with its own cache.
"""

import os

# Otherwise PyTorch's threads spin while they wait, and slow other work on the same cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.inference.decoding import bucket, decoding_programs, slots
from tokenformer_jax.inference.sampling import Sampling, sample
from tokenformer_jax.nn.parameters import split

_BATCH = flags.DEFINE_integer("batch_size", 1, "Rows.")
_PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens of each prompt.")
_NEW = flags.DEFINE_integer("new", 128, "New tokens after each prompt.")
_ROOM = flags.DEFINE_integer("room", 0, "New tokens that are asked for, of which --new are generated.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are reported.")
_DTYPE = flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Dtype of products and cache.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0 draws from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the nucleus of this probability.")
_HUGGINGFACE = flags.DEFINE_bool("huggingface", False, "Also measure GPTNeoXForCausalLM.")


class Ours:
  """This package: reads the prompts once and then runs the compiled step for every token.

  Args:
    prompts: ids [B, T].
    doubles: whether the cache has few slots at first and doubles when it is full, as `generate` does it.
  """

  def __init__(self, prompts, doubles=True):
    config = tf.ModelConfig.named("150m", compute_dtype=_DTYPE.value)
    graphdef, *self._leaves = split(tf.LanguageModel(config, rngs=nnx.Rngs(0)).for_decoding())
    self._prefill, self._decode_step = decoding_programs(graphdef)
    self._prompts, self._start = prompts, np.zeros(len(prompts), np.int32)
    self._most, self._doubles = bucket(_PROMPT.value + max(_NEW.value, _ROOM.value)), doubles
    self._sampling = Sampling.checked(
      vocab_size=config.vocab_size, temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
    )
    self._draw = jax.jit(sample)
    self._read = jax.jit(lambda leaves: sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(leaves)))

  def run(self):
    """Returns seconds (for the prompts, for all new tokens)."""
    begin = time.perf_counter()
    num_slots = slots(_PROMPT.value + 1, self._most) if self._doubles else self._most
    logits, cache = self._prefill(self._leaves, self._prompts, self._start, num_slots=num_slots)
    tokens = self._draw(logits, self._sampling, np.int32(0)).block_until_ready()
    read = time.perf_counter()
    for index in range(_NEW.value):
      if _PROMPT.value + index == cache.num_slots:
        cache = cache.with_slots(slots(cache.num_slots + 1, self._most))
      logits, cache = self._decode_step(self._leaves, tokens, cache)
      tokens = self._draw(logits, self._sampling, np.int32(index + 1))
      tokens.block_until_ready()  # `generate` also waits for each token, to show it.
    self._cache, self._logits = cache, logits
    return read - begin, time.perf_counter() - read

  def limit(self):
    """Returns the seconds to read weights and cache `new` times, and their size in bytes."""
    leaves = self._leaves, self._cache.layers
    self._read(leaves).block_until_ready()
    begin = time.perf_counter()
    for _ in range(_NEW.value // 4):
      self._read(leaves).block_until_ready()
    return 4 * (time.perf_counter() - begin), sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))

  def draw(self):
    """Returns the seconds for drawing one token for each row."""
    begin = time.perf_counter()
    self._draw(self._logits, self._sampling, np.int32(0)).block_until_ready()
    return time.perf_counter() - begin

  def num_programs(self):
    return [program._cache_size() for program in (self._prefill, self._decode_step, self._draw)]


class HuggingFace:
  """`generate` of a model with Pythia 160M's shape, without a token that ends the text."""

  def __init__(self, prompts):
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
      vocab_size=50304,
      hidden_size=768,
      num_hidden_layers=12,
      num_attention_heads=12,
      intermediate_size=3072,
      max_position_embeddings=2048,
      rotary_pct=0.25,
    )
    self._model = GPTNeoXForCausalLM(config).eval().to(getattr(torch, _DTYPE.value))
    self._prompts, self._torch = torch.from_numpy(prompts.astype(np.int64)), torch
    self._sampling = dict(do_sample=False)
    if _TEMPERATURE.value:
      self._sampling = dict(do_sample=True, temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)

  def run(self):
    def seconds(new):
      begin = time.perf_counter()
      self._model.generate(
        self._prompts,
        attention_mask=self._torch.ones_like(self._prompts),
        pad_token_id=0,
        max_new_tokens=new,
        min_new_tokens=new,
        **self._sampling,
      )
      return time.perf_counter() - begin

    with self._torch.inference_mode():
      first = seconds(1)
      return first, seconds(1 + _NEW.value) - first


def main(argv):
  del argv
  prompts = np.random.default_rng(0).integers(0, 50000, (_BATCH.value, _PROMPT.value)).astype(np.int32)
  sides = {"ours": Ours(prompts)}
  if _ROOM.value:
    sides["ours, all slots"] = Ours(prompts, doubles=False)
  if _HUGGINGFACE.value:
    sides["GPTNeoXForCausalLM"] = HuggingFace(prompts)
  for side in sides.values():
    side.run()
  programs = sides["ours"].num_programs()
  taken, limits, draws = {name: [] for name in sides}, [], []
  print(
    f"batch {_BATCH.value}, {_PROMPT.value} + {_NEW.value} tokens, {_DTYPE.value}, temperature "
    f"{_TEMPERATURE.value:g}, top_k {_TOP_K.value}, top_p {_TOP_P.value:g}; {os.cpu_count()} cores, "
    f"load {os.getloadavg()[0]:.1f}, jax {jax.__version__}",
    flush=True,
  )
  for _ in range(_ROUNDS.value):
    for name, side in sides.items():
      taken[name].append(side.run())
    limits.append(sides["ours"].limit())
    draws += [sides["ours"].draw() for _ in range(10)]
  if sides["ours"].num_programs() != programs:
    raise SystemExit("a program was compiled more than once.")
  limit, size = statistics.median(limit for limit, _ in limits), limits[0][1]
  print(
    f"limit: {1e3 * limit / _NEW.value:.1f} ms a step, {size * _NEW.value / limit / 1e9:.1f} GB/s of "
    f"{size / 1e9:.2f} GB; our draw of a token: {1e3 * statistics.median(draws):.1f} ms\n\n"
    "| | prompts, ms | ms a step (least – most) | new tokens/s | share of the limit "
    "| ours is faster |\n|---|---|---|---|---|---|"
  )
  step = {name: statistics.median(new for _, new in rounds) / _NEW.value for name, rounds in taken.items()}
  for name, rounds in taken.items():
    new = [1e3 * seconds / _NEW.value for _, seconds in rounds]
    print(
      f"| {name} | {1e3 * statistics.median(read for read, _ in rounds):.0f} "
      f"| {1e3 * step[name]:.1f} ({min(new):.1f} – {max(new):.1f}) | {_BATCH.value / step[name]:.1f} "
      f"| {100 * limit / _NEW.value / step[name]:.0f} % | {step[name] / step['ours']:.2f} |"
    )


if __name__ == "__main__":
  app.run(main)
