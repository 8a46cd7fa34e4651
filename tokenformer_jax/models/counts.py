"""Parameters and FLOPs of a model, counted from what its parameters declare."""

import functools
import math

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import is_matrix


@functools.cache
def num_parameters(config: ModelConfig) -> int:
  """Trained numbers. τ is state and not counted."""
  return sum(math.prod(parameter.shape) for parameter in _parameters(config))


@functools.cache
def num_non_embedding_parameters(config: ModelConfig) -> int:
  """Trained numbers inside the blocks, without norms, biases and gains: those of all matrices."""
  return sum(math.prod(matrix.shape) for matrix in _matrices(config))


@functools.cache
def num_active_parameters(config: ModelConfig) -> int:
  """Those of `num_non_embedding_parameters` that a token's products read, on average over tokens."""
  return round(sum(math.prod(matrix.shape) * matrix.active for matrix in _matrices(config)))


@functools.cache
def forward_flops_per_token(config: ModelConfig) -> int:
  """Forward FLOPs in products for a token at full context, causal attention counted at half; training is 3×."""
  # In a routed layer the square of the capacity's share of all pairs.
  layers = sum(config.depth.capacity**2 if config.is_routed(layer) else 1 for layer in range(config.num_layers))
  between_tokens = round((2 if config.is_causal else 4) * config.seq_length * config.hidden_size * layers)
  logits = 0 if config.task in ("classify", "encode") else 2 * config.vocab_size * config.hidden_size
  return 2 * num_active_parameters(config) + between_tokens + logits


def _parameters(config: ModelConfig) -> list[nnx.Param]:
  return [parameter for _, parameter in nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))]


def _matrices(config: ModelConfig) -> list[nnx.Param]:
  return [parameter for parameter in _parameters(config) if is_matrix(parameter.axes)]
