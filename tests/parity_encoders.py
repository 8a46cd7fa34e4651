"""Crammed BERT for its golden file, from its settings.

The original's arrays become our parameters by a linear function, so that the gradients can be taken by their names.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from tests.golden_files import Golden, NoModelError, Row, gradient_error, output_error, under, widest
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import split

# What a setting of crammed BERT must be, for there is no other part; or the parts that it chooses among.
_CRAMMED = dict(norm="LayerNorm", norm_scheme="pre", nonlin="GELUglu", tie_weights=True, decoder_bias=False)
_CRAMMED |= dict(use_bias=False, final_norm=True, skip_head_transform=True, ffn_layer_frequency=1)
_CRAMMED_ATTENTION = dict(causal_attention=False, qkv_bias=False, skip_output_projection=False, rotary_embedding=False)
_CRAMMED_POSITIONS = {"scaled-sinusoidal": "scaled_sinusoidal", "learned": "learned"}


def recognises(description) -> bool:
  """Whether a description is of crammed BERT."""
  return "ScriptableCrammedBERT" in (description.get("architectures") or [])


def rows(golden: Golden) -> list[Row]:
  """Hidden states and logits with and without padding, the loss of few tokens with its gradients, and the classes."""
  a = golden.arrays
  config, classifier = crammed_config(golden), crammed_config(golden, classifies=True)
  tokens, labels = (jnp.asarray(a[name], jnp.int32) for name in ("input_ids", "labels"))
  real = jnp.asarray(a["attention_mask"], bool)
  # As in the original, the loss is of the masked tokens alone, and no other logits are computed.
  masked = jnp.nonzero(labels.reshape(-1) >= 0)[0]

  def loss(arrays):
    model = built(config, crammed_parameters(arrays, config))
    hidden, padded = model.hidden(tokens)[0], model.hidden(tokens, real=real)[0]
    logits = model.logits(hidden.reshape(-1, hidden.shape[-1])[masked])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels.reshape(-1)[masked]).mean()
    return value, {
      "loss_sparse": value,
      "hidden": hidden,
      "hidden_masked": padded,
      "logits": model.logits(hidden),
      "logits_masked": model(tokens, real),
      "cls_logits": built(classifier, crammed_parameters(arrays, classifier))(tokens, real),
    }

  arrays = {**under(a, "param/"), **{f"cls/{name}": array for name, array in under(a, "cls/").items()}}
  grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  theirs = widest(a, "grad/")
  missing = [name for name in outputs if name not in a]
  assert not missing, missing
  errors = output_error(outputs, widest(a)), gradient_error({n: grads[n] for n in theirs}, theirs)
  return [Row(golden.name, *errors)]


def built(config: ModelConfig, parameters):
  """The model with these parameters."""
  graphdef, _, tau = split(abstract_model(config))
  return nnx.merge(graphdef, parameters, tau)


def crammed_config(golden: Golden, classifies: bool = False) -> ModelConfig:
  """The model of a description of crammed BERT.

  Raises:
    NoModelError: a setting for which there is no part.
  """
  c, embedding, attention = (golden.description, *(golden.description[name] for name in ("embedding", "attention")))
  for settings, needed in ((c, _CRAMMED), (attention, _CRAMMED_ATTENTION)):
    _need(settings, needed)
  _need(c["classification_head"], dict(pooler="zero_index", include_ff_layer=True, nonlin="Tanh"))
  if embedding["pos_embedding"] not in _CRAMMED_POSITIONS:
    raise NoModelError(f"no part for pos_embedding={embedding['pos_embedding']!r}")
  head = dict(num_classes=len(golden.arrays["cls/head.weight"]), pooler_size=c["classification_head"]["head_dim"])
  return ModelConfig.named(
    "tiny",
    "bert",
    vocab_size=len(golden.arrays["param/encoder.embedding.word_embedding.weight"]),
    num_layers=c["num_transformer_layers"],
    hidden_size=c["hidden_size"],
    num_heads=attention["num_attention_heads"],
    ffn_tokens=c["intermed_size"] // 2,
    seq_length=embedding["max_seq_length"],
    norm_epsilon=c["norm_eps"],
    embedding_norm="layer_norm" if embedding["normalization"] else "none",
    attention=dict(positions=_CRAMMED_POSITIONS[embedding["pos_embedding"]]),
    **(dict(task="classify", classifier=head) if classifies else {}),
  )


def _need(settings, needed) -> None:
  for name, value in needed.items():
    if settings.get(name, value) != value:
      raise NoModelError(f"no part for {name}={settings[name]!r}")


def crammed_parameters(arrays, config: ModelConfig):
  """Ours from the original's. Its queries, keys and values of a head follow one another; its first half of a gated
  product is the linear one."""
  encoder = {name.removeprefix("encoder."): array for name, array in arrays.items()}
  ours = {
    "embedding": encoder["embedding.word_embedding.weight"],
    **_weight_and_bias("final_norm", "final_norm", encoder),
  }
  if config.embedding_norm != "none":
    ours |= _weight_and_bias("embedding_norm", "embedding.norm", encoder)
  if config.attention.positions == "scaled_sinusoidal":
    ours["position_scale"] = encoder["embedding.pos_embedding.scale_factor"].reshape(())
  if config.attention.positions == "learned":
    ours["position_embedding"] = encoder["embedding.pos_embedding.embedding.weight"]
  if config.task == "classify":
    ours |= _dense("pooler", "cls/pooler.dense", arrays) | _dense("classes", "cls/head", arrays)

  def layer(index):
    a = under(encoder, f"layers.{index}.")
    in_heads = a["attn.self_attention.query_key_value.weight"].reshape(config.num_heads, 3, config.head_dim, -1)
    halves = jnp.split(a["ffn.dense_in.weight"], 2)
    return {
      **_weight_and_bias("norm", "norm1", a),
      **_weight_and_bias("ffn_norm", "norm2", a),
      **{
        f"attention/{name}/weight": in_heads[:, i].reshape(config.hidden_size, -1).T
        for i, name in enumerate(("query", "key", "value"))
      },
      "attention/proj/weight": a["attn.dense.weight"].T,
      "ffn/keys": halves[0],
      "ffn/gates": halves[1],
      "ffn/values": a["ffn.dense_out.weight"].T,
    }

  return _stacked(ours, layer, config)


def _stacked(ours, layer, config: ModelConfig):
  layers = [layer(index) for index in range(config.num_layers)]
  ours = ours | {f"blocks/{path}": jnp.stack([found[path] for found in layers]) for path in layers[0]}
  return traverse_util.unflatten_dict({path: jnp.asarray(array) for path, array in ours.items()}, sep="/")


def _weight_and_bias(path, name, arrays):
  return {f"{path}/scale": arrays[f"{name}.weight"], f"{path}/bias": arrays[f"{name}.bias"]}


def _dense(path, name, arrays):
  return {f"{path}/weight": arrays[f"{name}.weight"].T, f"{path}/bias": arrays[f"{name}.bias"]}
