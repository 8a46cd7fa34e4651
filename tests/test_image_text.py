"""Dual encoders: losses equal float64 sums over all pairs, on one device and on eight; towers of any preset; retrieval."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import small_run
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.image_text import ImageTextConfig
from tokenformer_jax.distributed.axes import batch_sharding, traced_on
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.evaluation.retrieval import recall_at, zero_shot
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.models.image_text import ImageTextModel
from tokenformer_jax.training.contrastive import contrastive_loss

BATCH, SIZE = 16, 6
MEANINGS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], np.int32)


def drawn():
  """(images, texts, scale, bias), of which the vectors have length 1."""
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(2, BATCH, SIZE))
  vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
  return *vectors.astype(np.float32), np.float32(5.0), np.float32(-2.0)


def oracle(kind, images, texts, scale, bias):
  """The sums over all pairs, one after the other."""
  scores = scale * np.float64(images) @ np.float64(texts).T + bias
  pairs = MEANINGS[:, None] == MEANINGS[None]
  if kind == "sigmoid":
    return (
      sum(np.logaddexp(0, -scores[i, j] if pairs[i, j] else scores[i, j]) for i in range(BATCH) for j in range(BATCH))
      / BATCH
    )
  total = 0.0
  for s in (scores, scores.T):
    for i in range(BATCH):
      total += np.log(np.sum(np.exp(s[i]))) - s[i, pairs[i]].mean()
  return total / (2 * BATCH)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_on_eight_devices_is_that_of_the_whole_batch(kind):
  """Value and gradients; what is sent are the vectors of the texts once, and numbers for each of them."""
  given = drawn()

  def loss(images, texts, scale, bias):
    return contrastive_loss(images, texts, scale, bias, jnp.asarray(MEANINGS), kind)

  gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  (whole, hits), d_whole = jax.jit(gradients)(*given)
  np.testing.assert_allclose(whole, oracle(kind, *given), rtol=1e-6)
  nearest = np.argmax(given[0] @ given[1].T, axis=1)
  assert hits == np.mean(MEANINGS[nearest] == MEANINGS)

  mesh = small_run.mesh(data=2, fsdp=4)
  placed = [jax.device_put(a, batch_sharding(mesh, a.shape)) for a in given[:2]]
  compiled = jax.jit(traced_on(mesh, gradients)).lower(*placed, *given[2:]).compile()
  (split, hits_split), d_split = compiled(*placed, *given[2:])
  np.testing.assert_allclose(split, whole, rtol=1e-6)
  assert hits_split == hits
  for ours, theirs in zip(d_split, d_whole):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert d_split[0].sharding.spec == placed[0].sharding.spec

  sent = Counter((c.kind, c.shape) for c in collectives(compiled.as_text(), mesh) if np.prod(c.shape) > 1)
  vectors = (
    sent.pop(("all-gather", (BATCH, SIZE))),
    sum(sent.pop((kind_of, (BATCH, SIZE)), 0) for kind_of in ("all-reduce", "reduce-scatter")),
  )
  assert vectors == (1, 1), sent
  assert all(np.prod(shape) <= BATCH for _, shape in sent), sent


def test_towers_of_any_preset_give_vectors_of_length_1_and_grow():
  sizes = dict(num_layers=2, hidden_size=16, num_heads=2, ffn_tokens=8, task="encode")
  images = dict(image_size=8, patch_size=4, channels=1, num_classes=0)
  image = ModelConfig.named("tiny", "tokenformer-vit", vision=images, **sizes)
  text = ModelConfig.named("tiny", "bert-original", transform=False, vocab_size=9, seq_length=6, **sizes)
  config = ImageTextConfig(image, text, size=SIZE)
  rng = np.random.default_rng(1)
  pixels = rng.normal(size=(3, 8, 8, 1)).astype(np.float32)
  tokens, real = rng.integers(0, 9, (2, 6)).astype(np.int32), np.arange(6)[None] < np.array([[4], [6]])
  model = jax.jit(lambda: ImageTextModel(config, rngs=nnx.Rngs(0)))()
  bigger, _ = grow(model, {"image/blocks/ffn": 12})
  assert bigger.image.blocks.ffn.keys.shape[1] == 12

  @jax.jit
  def run(model, bigger):
    return (
      model(pixels, tokens, real),
      bigger(pixels, tokens, real),
      model.of_images(pixels),
      model.of_texts(tokens, real),
    )

  scores, grown, of_images, of_texts = run(model, bigger)
  np.testing.assert_allclose(grown, scores, atol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(of_images, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(scores, (of_images @ of_texts.T) / 0.07, atol=1e-4)


def test_zero_shot_accuracy_and_recall_count_the_nearest():
  """Written out: prompts of a class are averaged, and a query counts whose k nearest have one of its meaning."""
  classes = np.array([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 1.0], [0.0, 1.0]]], np.float32)
  images = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [-1.0, 0.0]], np.float32)
  # The first class's mean is (0.9, 0.3) / √0.9.
  assert zero_shot(images, classes).tolist() == [0, 0, 1, 1]
  scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
  meanings = np.array([0, 1]), np.array([1, 0, 0])
  assert recall_at(scores, *meanings, (1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}
  with pytest.raises(ValueError, match="k=4: there are only 3 .* choose at most 3"):
    recall_at(scores, *meanings, (4,))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(text=dict(task="masked_token")), "text.task='masked_token': a tower has no head; choose 'encode'"),
    (dict(image="text"), "image.vision.image_size=0: give the size of the images"),
    (dict(loss="hinge"), "loss='hinge': choose one of softmax, sigmoid"),
  ],
)
def test_towers_that_do_not_fit_are_refused(changes, message):
  text = dict(vocab_size=9, task="encode")
  image = ModelConfig.named("tiny", "vit", task="encode", vision=dict(num_classes=0))
  made = ModelConfig.named("tiny", "bert", **{**text, **changes.get("text", {})})
  with pytest.raises(ValueError, match=message):
    ImageTextConfig(made if "image" in changes else image, made, loss=changes.get("loss", "softmax"))
