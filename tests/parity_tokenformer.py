"""Models and layers of the released TokenFormer for its golden files; the names are those of the released code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

from tests.golden_files import Golden, Row, gradient_error, largest, under
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.names import from_released, released_names, to_released
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.rotary import rotation
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

_ZERO_KEYS = "logits_grown_zero_key_official_tau"


def rows(golden: Golden) -> list[Row]:
  """All that a file holds: single layers, a growth, a block or a whole model."""
  if "cases" in golden.description:
    return [pattention_row(golden, case) for case in golden.description["cases"]]
  if "config_small" in golden.description:
    return [growth_row(golden, size) for size in ("small", "grown")]
  return [layer_row(golden) if "x" in golden.arrays else language_model_row(golden)]


def recognises(description) -> bool:
  """Whether a description is of TokenFormer."""
  sizes = description.get("config_small", description.get("config", {}))
  return "Pattention" in description.get("kind", "") or "qkv_slot_num" in sizes


def model_config(sizes) -> ModelConfig:
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


def pattention_row(golden: Golden, case) -> Row:
  """One pattention layer. The mask, router or scale of the released code is applied to the keys."""
  a = under(golden.arrays, case["name"] + "/")

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
  arguments = [f"{key} {case[key]}" for key in ("mask", "router", "scale") if key in case]
  return Row(
    f"{golden.name} {case['name']} ({', '.join([case['norm'], *arguments])})",
    largest(y, a["y__f64"]),
    gradient_error(grads, under(a, "grad_", "__f64")),
  )


def layer_row(golden: Golden) -> Row:
  """One block; the golden arrays are [sequence, batch, hidden]."""
  a = golden.arrays
  config = model_config(golden.description["config"])
  graphdef, _, tau = split(Block(config, rngs=nnx.Rngs(0)))
  paths = {
    name.removeprefix("sequential.2."): path.removeprefix("blocks/")
    for name, (path, layer) in released_names(1).items()
    if layer is not None
  }
  positions = jnp.arange(len(a["x"]))[None]
  context = Context(positions, rotation(positions, config.rotary_dims, config.rotary_base))

  @jax.jit
  def layer(x, arrays):
    parameters = traverse_util.unflatten_dict({paths[name]: array for name, array in arrays.items()}, sep="/")
    y, _, _ = nnx.merge(graphdef, parameters, tau)(x.swapaxes(0, 1), context)
    return y.swapaxes(0, 1)

  y, pullback = jax.vjp(layer, jnp.asarray(a["x"]), under(a, "param/"))
  grad_x, grads = pullback(jnp.asarray(a["cotangent"]))
  expected = {**under(a, "grad/", "__f64"), "x": a["grad_x__f64"]}
  return Row(golden.name, largest(y, a["y__f64"]), gradient_error({**grads, "x": grad_x}, expected))


def language_model_row(golden: Golden) -> Row:
  """The whole model: its logits and loss are the outputs, and the gradient is that of the loss."""
  a = golden.arrays
  config = model_config(golden.description["config"])
  graphdef, _, tau = split(LanguageModel(config, rngs=nnx.Rngs(0)))

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(parameters):
    logits = nnx.merge(graphdef, parameters, tau)(jnp.asarray(a["tokens"], jnp.int32))
    labels = jnp.asarray(a["labels"], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  parameters = jax.tree.map(jnp.asarray, from_released(under(a, "param/"), config))
  (value, logits), grads = jax.jit(loss)(parameters)
  return Row(
    golden.name,
    max(largest(logits, a["logits__f64"]), largest(value, a["loss__f64"])),
    gradient_error(to_released(grads), under(a, "grad/", "__f64")),
  )


def growth_row(golden: Golden, size) -> Row:
  """The small model of the released growth, or the grown one with zero new keys; only logits, in float32."""
  a = golden.arrays
  config = model_config(golden.description[f"config_{size}"])
  graphdef, _, tau = split(LanguageModel(config, rngs=nnx.Rngs(0)))
  parameters = jax.tree.map(jnp.asarray, from_released(under(a, f"param_{size}/"), config))
  logits = jax.jit(nnx.merge(graphdef, parameters, tau))(jnp.asarray(a["tokens"], jnp.int32))
  return Row(f"{golden.name} {size}", largest(logits, a["logits_small" if size == "small" else _ZERO_KEYS]))
