"""Which model a configuration describes, and what it has before any array is made."""

from typing import Any

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.masked_language_model import MaskedLanguageModel
from tokenformer_jax.models.text_encoder import TextClassifier, TextEncoder
from tokenformer_jax.models.vision_classifier import VisionClassifier, VisionEncoder

AnyModel = LanguageModel | MaskedLanguageModel | TextEncoder | VisionEncoder


def model_class(config: ModelConfig) -> type[Any]:
  """The class of the model that `config` describes; `model_class(config)(config, rngs=…)` makes it."""
  match config.task:
    case "next_token":
      return LanguageModel
    case "masked_token":
      return MaskedLanguageModel
    case "encode":
      return VisionEncoder if config.reads_images else TextEncoder
  return VisionClassifier if config.reads_images else TextClassifier


def abstract_model(config: ModelConfig) -> Any:
  """The model with `jax.ShapeDtypeStruct`s instead of arrays."""
  return nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))
