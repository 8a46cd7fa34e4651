"""TokenFormer in JAX: attention over parameter tokens, and models that grow by adding them."""

import importlib
import importlib.metadata
import typing

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
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

if typing.TYPE_CHECKING:
  from tokenformer_jax.evaluation.evaluate import evaluate
  from tokenformer_jax.inference.generate import generate
  from tokenformer_jax.inference.int8 import int8_tokens
  from tokenformer_jax.interop.export import export
  from tokenformer_jax.interop.pretrained import from_pretrained
  from tokenformer_jax.interop.save import save
  from tokenformer_jax.training.checkpoints import load, load_tokenizer
  from tokenformer_jax.training.loop import train

  __version__: str

# These modules import checkpoints, data or tokenizers, which a layer does not need; they are imported at first use.
_LAZY = {
  "evaluate": "tokenformer_jax.evaluation.evaluate",
  "export": "tokenformer_jax.interop.export",
  "from_pretrained": "tokenformer_jax.interop.pretrained",
  "generate": "tokenformer_jax.inference.generate",
  "int8_tokens": "tokenformer_jax.inference.int8",
  "load": "tokenformer_jax.training.checkpoints",
  "load_tokenizer": "tokenformer_jax.training.checkpoints",
  "save": "tokenformer_jax.interop.save",
  "train": "tokenformer_jax.training.loop",
}

__all__ = [
  "Config",
  "DataConfig",
  "GrowthConfig",
  "GrowthStage",
  "LanguageModel",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "ParameterTokens",
  "Pattention",
  "TrainingConfig",
  "__version__",
  "evaluate",
  "export",
  "from_pretrained",
  "generate",
  "grow",
  "int8_tokens",
  "load",
  "load_tokenizer",
  "pattention",
  "save",
  "shrink",
  "train",
]


def __getattr__(name: str) -> typing.Any:
  if name == "__version__":
    try:
      value = importlib.metadata.version("tokenformer_jax")
    except importlib.metadata.PackageNotFoundError:
      value = "0+unknown"  # The package is used from its source folder without an installation.
  elif name in _LAZY:
    value = getattr(importlib.import_module(_LAZY[name]), name)
  else:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
