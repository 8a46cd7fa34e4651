"""The smallest run with every part of a run, for the tests of training and growth."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax import data
from tokenformer_jax.config import (
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

# 8 divides every axis that a mesh may split.
MODEL = ModelConfig(
  vocab_size=264, num_layers=2, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=16, seq_length=16
)
GROWN = MODEL.grown(qkv_tokens=16, proj_tokens=24, ffn_tokens=32)
# Epsilon is large, because Adam would otherwise turn a gradient of pure rounding errors into a full step. There is no
# weight decay, so that only gradients move parameters, and the rate does not depend on the length of the run.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, decay_steps=0, eps=1e-2, weight_decay=0.0)
TEXT = "".join(f"def f{i}(x):\n  return x * {i * i} + {i}\n\n" for i in range(400))


def config(source: str = "python-sources", stages=(), **training) -> Config:
  """Returns a run of MODEL on 8 rows of 16 ids, without samples."""
  return Config(
    model=MODEL,
    data=DataConfig(source=source, batch_size=8, held_out_fraction=0.1),
    optimizer=OPTIMIZER,
    growth=GrowthConfig(stages=tuple(stages), warmup_steps=2),
    training=TrainingConfig(**{"sample_tokens": 0, "eval_batches": 2, **training}),
  )


def stage(step: int, model: ModelConfig = GROWN) -> GrowthStage:
  return GrowthStage(step, model.qkv_tokens, model.proj_tokens, model.ffn_tokens)


def mesh(data: int = 1, fsdp: int = 1, token: int = 1, sequence: int = 1) -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(data, fsdp, token, sequence), jax.devices()[: data * fsdp * token * sequence])


def batch(seed: int = 0, rows: int = 8, weights: bool = False) -> data.Batch:
  rng = np.random.default_rng(seed)
  inputs, labels = rng.integers(0, MODEL.vocab_size, (2, rows, MODEL.seq_length), np.int32)
  # The rows have very different weights, so that a mean of means differs from the mean.
  given = rng.integers(0, 2, inputs.shape) * rng.exponential(size=(rows, 1)) if weights else None
  return data.Batch(inputs, labels, weights=None if given is None else given.astype(np.float32))


def placed(batch: data.Batch, mesh: jax.sharding.Mesh) -> data.Batch:
  """Returns the batch with the sharding of a run on `mesh`."""
  return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape)), batch)


def noise(shapes, seed: int = 0):
  """Returns random arrays of these shapes, dtypes and shardings; integers are from 0 to 9."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    values = rng.integers(0, 10, leaf.shape) if leaf.dtype.kind == "i" else np.abs(rng.normal(size=leaf.shape))
    return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

  return jax.tree.map(draw, shapes)


def drawn_model() -> LanguageModel:
  """Returns a model with MODEL's sizes, far from the initial one."""
  graphdef, params, tau = split(LanguageModel(MODEL, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
  return nnx.merge(graphdef, params, tau)


def assert_same(tree, other) -> None:
  """Asserts that both trees have the same leaves, bit by bit."""
  a, b = leaves_by_path(tree), leaves_by_path(other)
  assert a.keys() == b.keys()
  different = [
    path
    for path in a
    if np.asarray(a[path]).tobytes() != np.asarray(b[path]).tobytes()
    or a[path].dtype != b[path].dtype
    or a[path].shape != b[path].shape
  ]
  assert not different, different


def assert_close(tree, other, relative: float) -> None:
  """Asserts for each leaf that the largest difference is at most `relative` times the leaf's largest number."""
  a, b = leaves_by_path(tree), leaves_by_path(other)
  assert a.keys() == b.keys()
  errors = {
    path: np.max(np.abs(np.asarray(a[path], np.float64) - b[path])) / max(np.max(np.abs(b[path])), 1e-30) for path in a
  }
  too_large = {path: error for path, error in errors.items() if not error <= relative}
  assert not too_large, too_large


def digest(tree) -> str:
  """Returns the SHA-256 of all leaves with their names, dtypes and shapes."""
  hashed = hashlib.sha256()
  for path, leaf in leaves_by_path(tree).items():
    hashed.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
  return hashed.hexdigest()


def folder_digest(folder) -> str:
  """Returns the SHA-256 of all files below a folder with their names."""
  hashed = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    hashed.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b""))
  return hashed.hexdigest()


def replace(config: Config, **sections) -> Config:
  """Returns `config` with fields of its sections changed: `replace(config, optimizer=dict(beta2=0.999))`."""
  return dataclasses.replace(
    config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
  )
