"""Parameters and FLOPs of a model, counted from what its parameters declare."""

import functools
import math

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.model_class import abstract_model

# The parameters outside of the blocks that are looked up or multiply the last block's outputs.
_EMBEDDINGS = ("embedding", "position_embedding", "head")


@functools.cache
def num_parameters(config: ModelConfig) -> int:
  """Trained numbers. τ is state and not counted."""
  return sum(math.prod(variable.shape) for _, variable in _parameters(config))


@functools.cache
def num_non_embedding_parameters(config: ModelConfig) -> int:
  """Trained numbers inside the blocks, without norms, biases and gains: those of all matrices."""
  return sum(_matrices(config))


@functools.cache
def forward_flops_per_token(config: ModelConfig) -> int:
  """Forward FLOPs in products for a token at full context, causal attention counted at half; training is 3×."""
  between_tokens = 2 * config.seq_length * config.hidden_size * config.num_layers
  return 2 * num_non_embedding_parameters(config) + between_tokens + 2 * config.vocab_size * config.hidden_size


def _parameters(config: ModelConfig) -> list[tuple[tuple, nnx.Param]]:
  return list(nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param)))


def _matrices(config: ModelConfig) -> list[int]:
  """The size of every parameter of the blocks that is a matrix, a stack of layers counted with all of them."""
  return [
    math.prod(variable.shape)
    for path, variable in _parameters(config)
    if path[0] not in _EMBEDDINGS and len([axis for axis in variable.axes if axis != "layer"]) > 1
  ]
