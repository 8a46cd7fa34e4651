"""Hugging Face's language models for their golden files, from their config.json."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tests.golden_files import Golden, NoModelError, Row, gradient_error, output_error, under, widest
from tokenformer_jax.interop.hugging_face import model_from, to_hugging_face
from tokenformer_jax.interop.hugging_face_config import FAMILIES
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split


def recognises(description) -> bool:
  """Whether a description is of one of the families that the library reads."""
  return description.get("config", {}).get("model_type") in FAMILIES


def rows(golden: Golden) -> list[Row]:
  """Logits, loss, hidden states and gradients of a model."""
  a, fields = golden.arrays, golden.description["config"]
  try:
    graphdef, parameters, tau = split(model_from(fields, under(a, "param/")))
  except ValueError as error:
    raise NoModelError(str(error)) from None

  def loss(parameters, tokens, labels):
    outputs = outputs_of(nnx.merge(graphdef, parameters, tau), tokens)
    value = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels).mean()
    return value, {"loss": value, **outputs}

  inputs = (jnp.asarray(a[name], jnp.int32) for name in ("input_ids", "labels"))
  grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(parameters, *inputs)
  theirs = widest(a, "grad/")
  return [
    Row(
      golden.name,
      output_error(outputs, widest(a)),
      gradient_error(to_hugging_face(grads, fields, list(theirs)), theirs),
    )
  ]


def outputs_of(model: LanguageModel, tokens) -> dict[str, jax.Array]:
  """Logits and hidden states: after the embedding and after each layer, the last one after the final norm."""

  def block(block, x, context):
    x, _, _ = block(x, context)
    return x, x

  last, seen = model.through_layers(block, tokens)
  first = [seen["first"]] if "first" in seen else []
  hidden = [model.embed(tokens, jnp.arange(tokens.shape[1])[None]), *first, *seen["blocks"]][: model.config.num_layers]
  return {"logits": model.logits(last), **{f"hidden/{i}": x for i, x in enumerate([*hidden, last])}}
