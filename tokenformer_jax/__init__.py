"""TokenFormer in JAX: attention over parameter tokens, and models that grow by adding them."""

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

__all__ = ["Config", "LanguageModel", "ModelConfig", "ParameterTokens", "Pattention", "grow",
           "pattention"]
