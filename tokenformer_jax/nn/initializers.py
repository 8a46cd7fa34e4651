"""Standard deviations of new parameters, as a function of the model's shape."""

import math

from tokenformer_jax.config import ModelConfig

# Of embeddings, keys and dense matrices, in all of the codebases whose models are built here.
STD = 0.02


def value_std(config: ModelConfig) -> float:
  """Values of parameter tokens, as in the released code: 2 / (L √d), GPT-NeoX's `wang_init`."""
  return 2.0 / (config.num_layers * math.sqrt(config.hidden_size))


def output_std(config: ModelConfig) -> float:
  """Dense matrices whose outputs are added to a residual stream: 0.02 / √(2 L), as in GPT-2.

  Blocks with trained gains begin at 0.02: their gains limit what is added (arXiv 2311.01906).
  """
  return STD if config.residual.trained else STD / math.sqrt(2 * config.num_layers)
