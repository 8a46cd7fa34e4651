"""Hugging Face's models for their golden files, from their config.json."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.golden_files import Golden, NoModelError, Row, gradient_error, output_error, under, widest
from tokenformer_jax.interop.hugging_face import model_from, to_hugging_face
from tokenformer_jax.interop.hugging_face_families import FAMILIES
from tokenformer_jax.nn.parameters import split


def recognises(description) -> bool:
  """Whether a description is of one of the families that the library reads."""
  return description.get("config", {}).get("model_type") in FAMILIES


def rows(golden: Golden) -> list[Row]:
  """Logits, loss, hidden states and gradients of a model."""
  a, fields = golden.arrays, golden.description["config"]
  # Earlier files do not name the class, which the parameters tell.
  if fields["model_type"] == "vit":
    fields = {"architectures": ["ViTForImageClassification"]} | fields
    fields = fields | {"num_labels": len(a["param/classifier.weight"])}
  try:
    graphdef, parameters, tau = split(model_from(fields, under(a, "param/")))
  except ValueError as error:
    raise NoModelError(str(error)) from None

  def loss(parameters, inputs, labels):
    outputs = outputs_of(nnx.merge(graphdef, parameters, tau), inputs)
    counted = labels >= 0
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], jnp.where(counted, labels, 0))
    value = jnp.sum(nats * counted) / jnp.sum(counted)
    return value, {"loss": value, **outputs}

  grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(parameters, inputs_of(a), jnp.asarray(a["labels"], jnp.int32))
  theirs = widest(a, "grad/")
  if fields["model_type"] in ("vit", "bert"):
    # Softmax does not change with what all keys have in common, so these gradients are 0 but for rounding errors.
    keys = ("k_proj.bias", "key.bias")
    theirs |= {name: np.zeros_like(gradient) for name, gradient in theirs.items() if name.endswith(keys)}
  return [
    Row(
      golden.name,
      output_error(outputs, widest(a)),
      gradient_error(to_hugging_face(grads, fields, list(theirs)), theirs),
    )
  ]


def inputs_of(arrays) -> dict[str, jax.Array]:
  """The inputs of a file, under the names of our arguments."""
  if "pixel_values" in arrays:
    return {"images": jnp.asarray(arrays["pixel_values"]).transpose(0, 2, 3, 1)}
  inputs = {"tokens": jnp.asarray(arrays["input_ids"], jnp.int32)}
  if "attention_mask" in arrays:
    inputs["real"] = jnp.asarray(arrays["attention_mask"], bool)
  if "token_type_ids" in arrays:
    inputs["types"] = jnp.asarray(arrays["token_type_ids"], jnp.int32)
  return inputs


def outputs_of(model: Any, inputs) -> dict[str, jax.Array]:
  """Logits and hidden states: after the embedding and after each layer, a language model's last one after the final norm."""

  def block(block, x, context):
    x, _, _ = block(x, context)
    return x, x

  last, seen = model.through_layers(block, **inputs)
  if "images" in inputs:
    embedded = model.embed(inputs["images"])
  else:
    positions = jnp.arange(inputs["tokens"].shape[1])[None]
    embedded = model.embed(inputs["tokens"], positions, inputs.get("types"))
  hidden = [embedded, *([seen["first"]] if "first" in seen else []), *seen["blocks"]]
  if model.config.is_causal:
    hidden = [*hidden[: model.config.num_layers], last]
  outputs = {"logits": model.logits(last), **{f"hidden/{i}": x for i, x in enumerate(hidden)}}
  return outputs | ({"pooled": model.pooled(last)} if hasattr(model, "pooled") else {})
