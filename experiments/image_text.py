"""A dual encoder of photographs of clothes and captions made of their labels: zero-shot classes, recall, and a picture.

    python -m experiments.image_text --workdir=runs/image_text --towers=tokenformer --loss=softmax

trains on `clothing_small_64` in the folder `$TOKENFORMER_DATA` (3,068 photographs of 64 × 64 pixels, ten classes), measures
on its 372 test photographs, and writes WORKDIR/results.json and WORKDIR/matches.png: the photographs whose own caption wins
and loses by most. A run that is stopped goes on where it last saved, with the same numbers.

Captions have the label in one of `TEMPLATES`; two of these are kept for prompts alone. All captions of a class mean the same,
so that in a batch every one of them is right (`meanings` of `contrastive_loss`), and recall counts any item of the class.
"""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from absl import flags
from flax import nnx

from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, GrowthConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.image_text import CONTRASTIVE_LOSSES, ImageTextConfig
from tokenformer_jax.data import word_piece
from tokenformer_jax.data.image_sources import ImageSource, open_images
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.data.tokenizer import HuggingFaceTokenizer
from tokenformer_jax.evaluation.retrieval import recall_at, zero_shot
from tokenformer_jax.models.image_text import ImageTextModel
from tokenformer_jax.nn.parameters import declared, split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.contrastive import CONTRASTIVE, PairBatch
from tokenformer_jax.training.optimizer import make_optimizer
from tokenformer_jax.training.schedules import learning_rate_schedule
from tokenformer_jax.training.state import fresh_state
from tokenformer_jax.training.step import make_train_step
from tokenformer_jax.training.tau import make_tau_rule

TEMPLATES = ("a photo of {}", "a picture of {}", "{} for sale", "this is {}", "an old {}", "someone wears {}")
PROMPTS = ("a photograph of {}", "a good {}")
TEXT_LENGTH, BATCH, SAVED_EVERY = 8, 64, 50
TOWERS = {"tokenformer": ("tokenformer-vit", "tokenformer"), "dense": ("vit", "bert-original")}


class Pairs:
  """Photographs, their labels, and captions as ids."""

  def __init__(self, source: ImageSource):
    images, labels = zip(*(source.read(index) for index in range(source.length)))
    self.pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    self.labels, self.classes = np.asarray(labels, np.int32), source.classes
    words = " ".join([*TEMPLATES, *PROMPTS, *source.classes]).replace("{}", "").replace("-", " - ").split()
    self._tokenizer = HuggingFaceTokenizer(word_piece.describe([*word_piece.SPECIAL, *dict.fromkeys(words)]), "[SEP]")
    self.vocab_size = self._tokenizer.vocab_size

  def texts(self, texts) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments) [B, TEXT_LENGTH] of texts, between [CLS] and [SEP]."""
    ids = np.zeros((len(texts), TEXT_LENGTH), np.int32)
    segments = np.zeros_like(ids)
    for row, text in enumerate(texts):
      found = self._tokenizer.encode(f"[CLS] {text} [SEP]")
      ids[row, : len(found)], segments[row, : len(found)] = found, 1
    return ids, segments

  def captions(self, rows: np.ndarray, rng: np.random.Generator) -> list[str]:
    return [TEMPLATES[rng.integers(len(TEMPLATES))].format(self.classes[self.labels[row]]) for row in rows]

  def batch(self, seed: int, step: int, size: int) -> PairBatch:
    """The batch of one update, which depends on seed and step alone: photographs mirrored and moved by up to 4 pixels."""
    rng = np.random.default_rng([seed, step])
    rows = rng.choice(len(self.labels), size, replace=False)
    images = self.pixels[rows]
    images = np.where(rng.random(size)[:, None, None, None] < 0.5, images[:, :, ::-1], images)
    images = np.stack([np.roll(image, rng.integers(-4, 5, 2), axis=(0, 1)) for image in images])
    return PairBatch(normalised(images), *self.texts(self.captions(rows, rng)), self.labels[rows])


def normalised(pixels: np.ndarray) -> np.ndarray:
  return pixels.astype(np.float32) / 127.5 - 1.0


def model_config(pairs: Pairs, towers: str, loss: str) -> ImageTextConfig:
  """Two towers of two layers of 64 channels; photographs are cut into patches of 8 × 8 pixels."""
  image, text = TOWERS[towers]
  side = pairs.pixels.shape[1]
  vision = dict(image_size=side, patch_size=side // 8, num_classes=0)
  return ImageTextConfig(
    ModelConfig.named("tiny", image, task="encode", vision=vision),
    ModelConfig.named(
      "tiny", text, task="encode", transform=False, vocab_size=pairs.vocab_size, seq_length=TEXT_LENGTH
    ),
    size=64,
    loss=loss,
  )


def train(pairs: Pairs, config: ImageTextConfig, workdir: str, num_steps: int, seed: int = 0, batch_size: int = BATCH):
  """The trained model. The optimizer, the step and the checkpoints are those of every run of the library."""
  abstract = nnx.eval_shape(lambda: ImageTextModel(config, rngs=nnx.Rngs(seed)))
  graphdef, *_ = split(abstract)
  axes, decayed = (declared(abstract, nnx.Param, name) for name in ("axes", "decayed"))
  rates = OptimizerConfig(learning_rate=1e-3, warmup_steps=num_steps // 10, decay_steps=num_steps * 8 // 10)
  run = Config(
    model=config.text,
    data=DataConfig(batch_size=batch_size),
    optimizer=rates,
    training=TrainingConfig(num_steps=num_steps, seed=seed),
  )
  optimizer, tau_rule = make_optimizer(rates, num_steps, GrowthConfig(), axes, decayed), make_tau_rule(run)

  @jax.jit
  def initial():
    _, params, tau = split(ImageTextModel(config, rngs=nnx.Rngs(seed)))
    return fresh_state(params, tau, axes, optimizer, tau_rule)

  step = make_train_step(
    graphdef, optimizer, tau_rule, learning_rate_schedule(rates, num_steps), 0.0, 1, objective=CONTRASTIVE
  )
  step = jax.jit(step, donate_argnums=0)
  checkpoints = Checkpoints(workdir, kept=1)
  state, done = initial(), checkpoints.latest_step() or 0
  if done:
    state = checkpoints.restore(
      done, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    )
  for index in range(done, num_steps):
    state, metrics = step(state, pairs.batch(seed, index, batch_size))
    if (index + 1) % SAVED_EVERY == 0 or index + 1 == num_steps:
      print(f"step {index + 1}: loss {metrics['loss']:.4f}", flush=True)
      checkpoints.save(index + 1, state, {"model": dataclasses.asdict(config)})
  checkpoints.close()
  return nnx.merge(graphdef, state.params, state.tau)


def measure(model: ImageTextModel, pairs: Pairs, seed: int = 0) -> tuple[dict, np.ndarray]:
  """(zero-shot accuracy and recall, the scores of each photograph with the prompts of each class [B, classes])."""
  of_images = jax.jit(lambda model, images: model.of_images(images))
  images = np.concatenate(
    [of_images(model, normalised(part)) for part in np.array_split(pairs.pixels, -(-len(pairs.pixels) // 128))]
  )
  of_texts = jax.jit(lambda model, ids, segments: model.of_texts(ids, segments > 0))

  def vectors(texts):
    return np.asarray(of_texts(model, *map(jnp.asarray, pairs.texts(texts))))

  prompts = vectors([prompt.format(name) for name in pairs.classes for prompt in PROMPTS])
  prompts = prompts.reshape(len(pairs.classes), len(PROMPTS), -1)
  found = zero_shot(images, prompts)
  texts = vectors(pairs.captions(np.arange(len(pairs.labels)), np.random.default_rng(seed)))
  scores, ks = images @ texts.T, [k for k in (1, 5, 10) if k <= len(images)]
  results = {
    "zero_shot": float(np.mean(found == pairs.labels)),
    "zero_shot_class_mean": float(np.mean([np.mean(found[pairs.labels == c] == c) for c in np.unique(pairs.labels)])),
    "largest_class": float(np.bincount(pairs.labels).max() / len(pairs.labels)),
    "text_of_image": recall_at(scores, pairs.labels, pairs.labels, ks),
    "image_of_text": recall_at(scores.T, pairs.labels, pairs.labels, ks),
  }
  return results, images @ prompts.mean(axis=1).T


def picture(pairs: Pairs, scores: np.ndarray, path: pathlib.Path, count: int = 6) -> None:
  """The photographs whose own prompt is further ahead of all others, and further behind one of them, than anywhere else."""
  own = np.take_along_axis(scores, pairs.labels[:, None], axis=1)[:, 0]
  others = np.where(np.arange(scores.shape[1])[None] == pairs.labels[:, None], -np.inf, scores)
  order = np.argsort(others.max(axis=1) - own, kind="stable")
  figure = matplotlib.figure.Figure(figsize=(2 * count, 5))
  for place, index in enumerate([*order[:count], *order[::-1][:count]]):
    axis = figure.add_subplot(2, count, place + 1)
    axis.imshow(pairs.pixels[index])
    axis.axis("off")
    label, best = pairs.labels[index], int(np.argmax(others[index]))
    axis.set_title(
      f"{pairs.classes[label]} {own[index]:.2f}\n{pairs.classes[best]} {others[index, best]:.2f}", fontsize=9
    )
  figure.suptitle("Best and worst matches: cosine with the photograph's own label, and with the best other one")
  figure.tight_layout()
  figure.savefig(path)


def main(argv) -> None:
  del argv
  arguments = flags.FLAGS
  folder = os.path.join(os.environ["TOKENFORMER_DATA"], "clothing_small_64")

  def opened(split: str) -> Pairs:
    return Pairs(open_images(parse_sources(f"npz:{folder}/{split}.npz")[0]))

  pairs, workdir = opened("train"), pathlib.Path(arguments.workdir).absolute()
  config = model_config(pairs, arguments.towers, arguments.loss)
  model = train(pairs, config, str(workdir), arguments.num_steps, arguments.seed)
  results, scores = measure(model, opened("test"), arguments.seed)
  (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  picture(opened("test"), scores, workdir / "matches.png")
  print(json.dumps(results))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The folder of checkpoints, results and the picture.", required=True)
  flags.DEFINE_enum("towers", "tokenformer", list(TOWERS), "The presets of both towers.")
  flags.DEFINE_enum("loss", "softmax", CONTRASTIVE_LOSSES, "The contrastive loss.")
  flags.DEFINE_integer("num_steps", 400, "Updates.")
  flags.DEFINE_integer("seed", 0, "Of parameters, batches and captions.")
  command.run(main)
