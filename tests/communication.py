"""What one layer of the language model sends on a mesh, derived from the design."""

import math
from collections import Counter

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.collectives import Collective

AXES = ("data", "fsdp", "sequence", "token")


def of_layers(found: list[Collective], num_layers: int) -> Counter:
  """What a layer sends, from a program: {(backward, kind, axes, number of elements): how often}."""
  return Counter((c.backward, c.kind, c.axes, math.prod(c.shape)) for c in found if c.trips == num_layers)


def on_paper(model: ModelConfig, rows: int, data: int = 1, fsdp: int = 1, sequence: int = 1, token: int = 1) -> Counter:
  """The same from the design, for a batch [rows, T] and Θ = `l2_norm_gelu`, as the compiler for CPUs writes it.

  That compiler writes a reduce-scatter as an all-reduce and a slice.
  """
  d = model.hidden_size
  m = rows * model.seq_length // (data * fsdp * sequence)  # The number of positions on a device.
  by_heads = token if model.num_heads % token == 0 else 1
  tokens = (
    6 * [model.qkv_tokens] + 2 * [model.proj_tokens] + 2 * [model.ffn_tokens]
  )  # The keys and values of five layers of tokens.
  forward, recomputed, backward = Counter(), Counter(), Counter()
  if token > 1:
    norms, sums = ("all-reduce", ("token",), m), ("all-reduce", ("token",), m * d)
    # norms: the squares of the scores (forward) or scores times their gradients (backward), summed over tokens.
    # sums: the output (forward) or the gradient of the input (backward), summed over tokens.
    forward[norms] += 5
    forward[sums] += 5
    backward.update(forward)
    recomputed[norms] += 5
    recomputed[sums] += 4 if model.remat == "full" else 0  # No gradient reads the last output of a layer.
  if by_heads > 1:
    gather = ("all-gather", ("token",), m * d)
    forward[gather] += 1  # The output of attention between tokens.
    recomputed[gather] += 1
    backward[gather] += 3  # The gradients of q, k and v.
  if sequence > 1:
    keys = rows // (data * fsdp) * model.seq_length * d // by_heads
    forward["all-gather", ("sequence",), keys] += 2  # k and v.
    recomputed["all-gather", ("sequence",), keys] += 2
    backward["all-reduce", ("sequence",), keys] += 2
  for count in tokens:
    held = count // token * d
    if fsdp > 1:
      forward["all-gather", ("fsdp",), held] += 1
      backward["all-gather", ("fsdp",), held] += 1
      backward["all-reduce", ("fsdp",), held] += 1
    for axis, size in (("data", data), ("sequence", sequence)):
      if size > 1:
        backward["all-reduce", (axis,), held // fsdp] += 1
  if model.remat != "none":
    backward.update(recomputed)
  return Counter(
    {(later, *sent): count for later, counts in ((False, forward), (True, backward)) for sent, count in counts.items()}
  )


def of_decode_step(model: ModelConfig, rows: int, data: int = 1, fsdp: int = 1, token: int = 1) -> Counter:
  """What a decode step sends, from the design: {(kind, axes, number of elements): how often}. No parameter is sent.

  Args:
    model: with Θ = `l2_norm_gelu`, norms without parameters, and heads that the devices along `token` divide.
    rows: one new token for each of them, split along `data`; attention also splits them along `fsdp`.
    data, fsdp, token: the sizes of the mesh.
  """
  d, layers, here = model.hidden_size, model.num_layers, rows // data
  sent: Counter = Counter()
  if fsdp > 1:
    for count in 3 * [model.qkv_tokens] + [model.proj_tokens, model.ffn_tokens]:
      sent["all-reduce", ("fsdp",), here * count // token] += layers  # Scores, summed over channels.
    sent["all-reduce", ("fsdp",), here] += 2 * (2 * layers + 1)  # Means and variances of the norms.
    sent["all-to-all", ("fsdp",), here * d // fsdp] += 4 * layers  # q, k and v from channels to rows, and back.
    sent["all-reduce", ("fsdp",), here * model.vocab_size // token] += 1  # Logits, summed over channels.
  if token > 1:
    sent["all-reduce", ("token",), here] += 5 * layers  # The squares of the scores.
    sent["all-reduce", ("token",), here * d // fsdp] += 5 * layers + 1  # Outputs; and the embedding.
    sent["all-gather", ("token",), here // fsdp * d] += layers  # The output of attention, from heads to channels.
    sent["all-gather", ("token",), here // fsdp * model.vocab_size] += 1  # Logits, for the draw.
  return sent
