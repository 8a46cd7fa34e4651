"""TokenFormer in JAX: attention over parameter tokens, and models that grow by adding them."""

import importlib

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

# Read when first used: they bring checkpoints or tokenizers with them, which a layer does not need.
_LATER = {
  "from_pretrained": "tokenformer_jax.interop.pretrained",
  "generate": "tokenformer_jax.inference.generate",
  "int8_tokens": "tokenformer_jax.inference.int8",
  "load": "tokenformer_jax.training.checkpoints",
  "load_tokenizer": "tokenformer_jax.training.checkpoints",
}

__all__ = [
  "Config",
  "LanguageModel",
  "ModelConfig",
  "ParameterTokens",
  "Pattention",
  "from_pretrained",
  "generate",
  "grow",
  "int8_tokens",
  "load",
  "load_tokenizer",
  "pattention",
  "shrink",
]


def __getattr__(name: str):
  if name not in _LATER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(_LATER[name]), name)
  globals()[name] = value
  return value
