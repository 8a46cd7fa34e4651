"""Which model a configuration describes, and what it has before any array is made."""

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import LanguageModel


def model_class(config: ModelConfig) -> type[LanguageModel]:
  """The class of the model that `config` describes; `model_class(config)(config, rngs=…)` makes it."""
  del config
  return LanguageModel


def abstract_model(config: ModelConfig) -> LanguageModel:
  """The model with `jax.ShapeDtypeStruct`s instead of arrays."""
  return nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))
