"""Compares our float32 results with the float64 results of the released code.

`python -m tests.parity_table` prints the table. The errors are the largest absolute difference of the outputs, and the
largest max|g − ĝ| / max|ĝ| of any gradient, of the parameters and of the input.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.names import from_released, released_names, to_released
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.rotary import rotation
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

GOLDEN = pathlib.Path(__file__).parent / "golden"
_ZERO_KEYS = "logits_grown_zero_key_official_tau"


class Row(NamedTuple):
  case: str
  output: float
  gradient: float | None = None


@functools.cache
def golden(name):
  """Returns (arrays, parsed JSON) of one golden file."""
  return dict(np.load(GOLDEN / f"{name}.npz")), json.loads((GOLDEN / f"{name}.json").read_text())


def under(arrays, prefix, suffix=""):
  """Returns the arrays whose names have this prefix and suffix, under names without them."""
  return {
    name[len(prefix) : len(name) - len(suffix)]: array
    for name, array in arrays.items()
    if name.startswith(prefix) and name.endswith(suffix)
  }


def model_config(sizes):
  """Returns the ModelConfig for the field names of a golden JSON file."""
  return ModelConfig(
    vocab_size=sizes["vocab"],
    num_layers=sizes["num_layers"],
    hidden_size=sizes["hidden_size"],
    num_heads=sizes["num_attention_heads"],
    qkv_tokens=sizes["qkv_slot_num"],
    proj_tokens=sizes["proj_slot_num"],
    ffn_tokens=sizes["ffn_slot_num"],
    seq_length=sizes["seq_length"],
  )


def pattention_row(case) -> Row:
  """One pattention layer. The mask, router or scale of the released code is applied to the keys."""
  a = under(golden("pattention_A")[0], case["name"] + "/")

  def released(x, keys, values):
    if "router" in case:
      keys, values = keys[a["router_index"]], values[a["router_index"]]
    keys = keys * case.get("scale", 1.0)
    apply = functools.partial(pattention, theta=case["norm"])
    tau = jnp.float32(initial_tau(case["norm"], len(keys)))
    if "mask" not in case:
      return apply(x, ParameterTokens(keys, values, tau))
    # Position t attends to the keys multiplied by row t of the mask.
    at_position = lambda x_t, row: apply(x_t, ParameterTokens(keys * row[:, None], values, tau))  # noqa: E731
    return jax.vmap(at_position, (-2, 0), -2)(x, a["attn_mask"].astype(np.float32))

  names = ("x", "key_param_tokens", "value_param_tokens")
  y, pullback = jax.vjp(jax.jit(released), *(jnp.asarray(a[name]) for name in names))
  grads = dict(zip(names, pullback(jnp.asarray(a["cotangent"]))))
  return Row(
    f"pattention_A {case['name']} ({_described(case)})",
    _largest(y, a["y__f64"]),
    _gradient_error(grads, under(a, "grad_", "__f64")),
  )


def layer_row() -> Row:
  """One block; the golden arrays are [sequence, batch, hidden]."""
  a, meta = golden("layer_A")
  config = model_config(meta["config"])
  graphdef, _, tau = split(Block(config, rngs=nnx.Rngs(0)))
  paths = {
    name.removeprefix("sequential.2."): path.removeprefix("blocks/")
    for name, (path, layer) in released_names(1).items()
    if layer is not None
  }
  cos_sin = rotation(jnp.arange(len(a["x"]))[None], config.rotary_dims, config.rotary_base)

  @jax.jit
  def layer(x, arrays):
    parameters = traverse_util.unflatten_dict({paths[name]: array for name, array in arrays.items()}, sep="/")
    return nnx.merge(graphdef, parameters, tau)(x.swapaxes(0, 1), cos_sin).swapaxes(0, 1)

  y, pullback = jax.vjp(layer, jnp.asarray(a["x"]), under(a, "param/"))
  grad_x, grads = pullback(jnp.asarray(a["cotangent"]))
  expected = {**under(a, "grad/", "__f64"), "x": a["grad_x__f64"]}
  return Row("layer_A", _largest(y, a["y__f64"]), _gradient_error({**grads, "x": grad_x}, expected))


def language_model_row() -> Row:
  """The whole model: its logits and loss are the outputs, and the gradient is that of the loss."""
  a, meta = golden("lm_A")
  config = model_config(meta["config"])
  graphdef, _, tau = split(LanguageModel(config, rngs=nnx.Rngs(0)))

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(parameters):
    logits = nnx.merge(graphdef, parameters, tau)(jnp.asarray(a["tokens"], jnp.int32))
    labels = jnp.asarray(a["labels"], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  parameters = jax.tree.map(jnp.asarray, from_released(under(a, "param/"), config))
  (value, logits), grads = jax.jit(loss)(parameters)
  return Row(
    "lm_A",
    max(_largest(logits, a["logits__f64"]), _largest(value, a["loss__f64"])),
    _gradient_error(to_released(grads), under(a, "grad/", "__f64")),
  )


def growth_row(size) -> Row:
  """The small model of the released growth, or the grown one with zero new keys; only logits, in float32."""
  a, meta = golden("growth_A")
  config = model_config(meta[f"config_{size}"])
  graphdef, _, tau = split(LanguageModel(config, rngs=nnx.Rngs(0)))
  parameters = jax.tree.map(jnp.asarray, from_released(under(a, f"param_{size}/"), config))
  logits = jax.jit(nnx.merge(graphdef, parameters, tau))(jnp.asarray(a["tokens"], jnp.int32))
  return Row(f"growth_A {size}", _largest(logits, a["logits_small" if size == "small" else _ZERO_KEYS]))


def pattention_cases():
  return golden("pattention_A")[1]["cases"]


def _described(case):
  arguments = [f"{key} {case[key]}" for key in ("mask", "router", "scale") if key in case]
  return ", ".join([case["norm"], *arguments])


def _largest(ours, theirs):
  return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))


def _gradient_error(ours, theirs):
  assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
  return max(_largest(ours[name], theirs[name]) / float(np.max(np.abs(theirs[name]))) for name in theirs)


def main():
  with jax.default_matmul_precision("highest"):
    rows = [
      *map(pattention_row, pattention_cases()),
      layer_row(),
      language_model_row(),
      *map(growth_row, ("small", "grown")),
    ]
  print("| golden file, case | largest output error | largest gradient error |\n|---|---|---|")
  for row in rows:
    print(f"| {row.case} | {row.output:.1e} | {'–' if row.gradient is None else f'{row.gradient:.1e}'} |")


if __name__ == "__main__":
  main()
