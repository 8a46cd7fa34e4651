"""Encoders: bidirectional attention without padding, the same numbers as the originals, growth, meshes, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from experiments import imagenet
from tests import parity_table, small_run
from tests.golden_files import GOLDEN
from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, ModelConfig
from tokenformer_jax.models.masked_language_model import MaskedLanguageModel
from tokenformer_jax.models.model_class import model_class
from tokenformer_jax.models.text_encoder import TextClassifier
from tokenformer_jax.models.vision_classifier import VisionClassifier
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.shaping import Shaping
from tokenformer_jax.training.objective import objective_of
from tokenformer_jax.training.program import make_program

SMALL = dict(vocab_size=48, num_layers=2, hidden_size=16, num_heads=2, ffn_tokens=24, seq_length=12)
CLASSES = dict(num_classes=3)


def encoder(preset="bert", task="masked_token", **changes) -> ModelConfig:
  return ModelConfig.named("tiny", preset, **{**SMALL, "task": task, **changes})


def vision(preset="tokenformer-vit", **changes) -> ModelConfig:
  sizes = {name: value for name, value in SMALL.items() if name not in ("vocab_size", "seq_length")}
  images = dict(image_size=8, patch_size=4, channels=1, num_classes=5)
  return ModelConfig.named("tiny", preset, **{**sizes, "vision": images, **changes})


def drawn(config):
  """(graph definition, parameters of order one half, τ), so that every term counts."""
  graphdef, params, tau = split(model_class(config)(config, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  return graphdef, jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), params), tau


@pytest.mark.parametrize("path", ["bert/bertA_cramming_preln", "bert/bert_mlm_A", "bert/bert_classes_A", "dense/vit_A"])
def test_outputs_and_gradients_are_those_of_the_original(path):
  (row,) = parity_table.rows_of(GOLDEN / f"{path}.npz")
  assert row.passes and not row.missing, row


@pytest.mark.parametrize(
  "preset, projection, changes",
  [
    ("bert", "dense", {}),
    ("bert", "pattention", {}),
    ("pre-ln", "dense", dict(residual=dict(norms="post"))),
    ("tokenformer", "pattention", {}),
    ("sas", "pattention", {}),
    ("sas-p-no-norm", "dense", {}),
  ],
)
def test_tokens_see_both_sides_and_no_padding(preset, projection, changes):
  config = encoder(preset, projection=projection, **changes)
  graphdef, params, tau = drawn(config)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 48, (2, 12), np.int32)
  # A text of 7 tokens alone, with padding, and as the second document of a row.
  text, real = tokens[:1, :7], np.arange(12)[None] < np.array([[7], [12]])
  packed = np.concatenate([tokens[1:, :5], text], axis=1)
  segments = np.repeat(np.array([[1, 2]], np.int32), (5, 7), axis=1)
  positions = np.concatenate([np.arange(5), np.arange(7)])[None].astype(np.int32)

  @jax.jit
  def outputs(params):
    model = nnx.merge(graphdef, params, tau)
    other = text.copy()
    other[0, 6] = (other[0, 6] + 1) % 48
    return model(text), model(other), model(tokens, real)[:1, :7], model(packed, None, positions, segments)[:, 5:]

  alone, other, padded, in_row = outputs(params)
  assert np.all(np.max(np.abs(other - alone), axis=-1) > 1e-4)
  np.testing.assert_allclose(padded, alone, atol=2e-5)
  np.testing.assert_allclose(in_row, alone, atol=2e-5)


def test_centred_attention_of_an_encoder_subtracts_the_mean_of_its_real_tokens():
  """C is 1 / T over the tokens of a document that are not padding, written out as a matrix."""
  rng = np.random.default_rng(0)
  mixed, v = rng.normal(size=(2, 2, 6, 2, 3))
  segments, real = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]]), np.arange(6)[None] < np.array([[5], [4]])
  shaping = Shaping(2, "centred", rngs=nnx.Rngs(0))
  shaping.alpha[...], shaping.gamma[...] = jnp.array([0.5, 2.0]), jnp.array([1.5, -1.0])
  visible = (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
  c = visible / visible.sum(axis=-1, keepdims=True)
  alpha, gamma = np.array([0.5, 2.0])[:, None], np.array([1.5, -1.0])[:, None]
  expected = alpha * v + mixed - gamma * np.einsum("bts,bshc->bthc", c, v)
  context = Context(jnp.arange(6)[None], None, jnp.asarray(segments, jnp.int32), jnp.asarray(real), causal=False)
  y, _ = shaping(jnp.asarray(mixed, jnp.float32), jnp.asarray(v, jnp.float32), context)
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_post_norm_block_equals_the_oracle():
  """The block of BERT: a norm behind each sum, GELU and biases."""
  config = encoder(
    norm="layer_norm",
    embedding_norm="none",
    attention=dict(bias="all", positions="learned"),
    ffn=dict(kind="mlp", bias=True),
    residual=dict(norms="post"),
  )
  graphdef, params, tau = split(Block(config, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda a: 0.5 * rng.normal(size=a.shape).astype(np.float32), params)
  x, real = rng.normal(size=(2, 5, 16)), np.arange(5)[None] < np.array([[5], [3]])
  p = jax.tree.map(np.float64, params)

  def dense(name, x):
    return x @ p["attention"][name]["weight"] + p["attention"][name]["bias"]

  def norm(name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * p[name]["scale"] + p[name]["bias"]

  q, k, v = (dense(name, x).reshape(2, 5, 2, 8) for name in ("query", "key", "value"))
  weights = np.where(real[:, None, None], np.exp(np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(8)), 0.0)
  mixed = np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v).reshape(2, 5, 16)
  u = norm("norm", x + dense("proj", mixed))
  units = u @ p["ffn"]["keys"].T + p["ffn"]["key_biases"]
  units = units * 0.5 * (1 + np.vectorize(math.erf)(units / np.sqrt(2)))
  expected = norm("ffn_norm", u + units @ p["ffn"]["values"] + p["ffn"]["bias"])

  context = Context(jnp.arange(5)[None], real=jnp.asarray(real), causal=False)
  y = jax.jit(lambda params, x: nnx.merge(graphdef, params, tau)(x, context)[0])(params, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
  "config, counts",
  [
    (encoder(task="classify", classifier=CLASSES), dict(ffn_tokens=40)),
    (vision(), dict(qkv_tokens=80, proj_tokens=72, ffn_tokens=40)),
  ],
  ids=["text", "images"],
)
def test_growth_of_an_encoder_is_exact(config, counts):
  model = nnx.merge(*drawn(config))
  rng = np.random.default_rng(3)
  x = (
    rng.normal(size=(2, 8, 8, 1)).astype(np.float32) if config.reads_images else rng.integers(0, 48, (2, 12), np.int32)
  )
  bigger, report = tf.grow(model, method="exact", **counts)
  assert bigger.config == config.grown(**counts) and report.num_parameters[1] == bigger.config.num_parameters
  y, grown = jax.jit(lambda a, b: (a(x), b(x)))(model, bigger)
  np.testing.assert_allclose(grown, y, atol=1e-6)
  assert y.dtype == jnp.float32 and y.shape == (2, 5 if config.reads_images else 3)


def test_a_train_step_of_an_encoder_on_eight_devices_equals_that_on_one():
  shaped = dict(shaped="centred", positions="learned")
  sizes = dict(qkv_tokens=16, proj_tokens=16, hidden_size=32, seq_length=16, num_heads=4)
  model = encoder("tokenformer", attention=shaped, **sizes)
  config = Config(model=model, data=DataConfig(batch_size=8), optimizer=small_run.OPTIMIZER)
  rng = np.random.default_rng(4)
  inputs, labels = rng.integers(0, 48, (2, 8, 16), np.int32)
  # Some texts are shorter than the row, and have fewer masked tokens.
  segments = (np.arange(16)[None] < rng.integers(6, 17, (8, 1))).astype(np.int32)
  places = np.sort(rng.permuted(np.tile(np.arange(6, dtype=np.int32), (8, 1)), axis=1)[:, :4], axis=1)
  weights = (np.arange(4)[None] < rng.integers(1, 5, (8, 1))).astype(np.float32)
  batch = data.MaskedBatch(inputs, places, labels[:, :4], weights, segments=segments)
  results = []
  for sizes in ({}, dict(data=2, fsdp=2, token=2)):
    mesh = small_run.mesh(**sizes)
    program = make_program(config, model, mesh)
    state = jax.device_put(jax.tree.map(np.array, program.initial_state()), program.shardings)
    state, metrics = program.train_step(state, small_run.placed(batch, mesh))
    results.append((jax.tree.map(np.array, state.params), float(metrics["loss"])))
  (one, loss), (eight, loss_of_eight) = results
  np.testing.assert_allclose(loss_of_eight, loss, rtol=1e-5)
  small_run.assert_close(eight, one, 1e-5)


def test_parameters_of_the_image_models():
  """86M with 576 tokens in each projection and 2304 in the feed-forward; ViT-B/16 has as many."""
  tokens = ModelConfig.named("124m", "tokenformer-vit")
  assert (tokens.qkv_tokens, tokens.ffn_tokens, tokens.seq_length) == (576, 2304, 196)
  assert tokens.num_non_embedding_parameters == 12 * (4 * 2 * 576 + 2 * 2304) * 768
  assert tokens.num_parameters == 86_446_312
  assert ModelConfig.named("150m", "vit").num_parameters == 86_567_656
  assert Config.from_dict(imagenet.get_config("tokenformer-109m")).model.num_parameters == 108_859_624


@pytest.mark.parametrize(
  "config, expected",
  [
    (encoder(), MaskedLanguageModel),
    (encoder(task="classify", classifier=CLASSES), TextClassifier),
    (vision(), VisionClassifier),
    (encoder(task="next_token"), tf.LanguageModel),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_task_chooses_the_class(config, expected):
  assert model_class(config) is expected
  assert ModelConfig.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: encoder(task="masked"), "task='masked': choose one of .* encode. Did you mean 'masked_token'?"),
    (lambda: encoder(task="classify"), "classifier.num_classes=0: a classifier of texts needs at least 1"),
    (lambda: encoder(classifier=CLASSES), "classifier.num_classes=3: only task='classify' of texts has this head"),
    (lambda: encoder("vit", vision=dict(image_size=32)), "vision.image_size=32: images .* choose 'classify'"),
    (lambda: vision(vocab_size=9), "vocab_size=9: vision.image_size=8: images have no vocabulary; choose 0"),
    (lambda: vision(seq_length=9), "seq_length=9: vision.image_size=8: an image has 4 tokens"),
    (lambda: vision(vision=dict(image_size=9, patch_size=4)), "image_size=9: must be a multiple of patch_size=4"),
    (lambda: encoder(vision=dict(num_classes=3)), "num_classes=3: image_size=0 is a model of text; leave 0"),
    (
      lambda: encoder(classifier=dict(pooler_size=3)),
      "classifier.pooler_size=3: task='masked_token' has no pooler; .* leave 0",
    ),
    (lambda: vision(tied=False), "tied=False: task='classify' has no logits of tokens; leave True"),
  ],
)
def test_parts_that_contradict_the_task_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_what_an_encoder_cannot_do_is_refused():
  model = nnx.merge(*drawn(encoder(vocab_size=264)))
  with pytest.raises(ValueError, match="model is a MaskedLanguageModel: an encoder .* generates no text; give a Lang"):
    tf.generate(model, data.open_tokenizer("bytes"), "a", max_new_tokens=1)
  with pytest.raises(ValueError, match="model.task='encode': it has no loss of its own; choose one of next_token, m"):
    objective_of(encoder(task="encode"))
  images = nnx.merge(*drawn(vision()))
  with pytest.raises(ValueError, match=r"images \(2, 8, 8, 3\): expected \[batch, 8, 8, 1\], height, width, channels"):
    images(jnp.zeros((2, 8, 8, 3)))
  with pytest.raises(
    ValueError, match="model is a MaskedLanguageModel, whose layers run under a scan: use is measured"
  ):
    tf.shrink(model, [np.ones((2, 4), np.int32)], ffn_tokens=4)


def test_logits_of_classes_are_not_rounded_to_bfloat16():
  config = encoder(compute_dtype="bfloat16", task="classify", classifier=dict(num_classes=3))
  logits = jax.jit(nnx.merge(*drawn(config)))(jnp.ones((4, 6), jnp.int32))
  assert logits.dtype == jnp.float32 and np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_float64_without_64_bit_types_is_refused_for_images():
  with pytest.raises(ValueError, match="compute_dtype='float64': JAX has it switched off"):
    nnx.eval_shape(lambda: VisionClassifier(vision(compute_dtype="float64"), rngs=nnx.Rngs(0)))
