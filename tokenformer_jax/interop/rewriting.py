"""Rewrites a grown model for the released code, whose τ is always √N (N for softmax).

Growth keeps τ while N rises, so a grown layer has τ < √N, and the released formula would give another
function. These changes to keys and values give the same function under the released formula:

    gelu_l2_norm, softmax   τ is a factor of the output: the values are multiplied by τ/√N (τ/N).
    l2_norm_gelu            τ is inside GeLU: k = min(N, d) rows are added, with keys c·R and values 0, where
                            RᵀR = KᵀK and c² = N'/τ² − 1. They add c²‖s‖² to the squared norm of the
                            scores s, hence √N' s / ‖s'‖ = τ s / ‖s‖.
"""

import math

import numpy as np
from flax import nnx, traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import declared
from tokenformer_jax.nn.theta import initial_tau


def rows_needed(num_tokens: int, hidden_size: int, taus, theta: str) -> int:
  """The number of tokens that a layer needs so that its τ can be the released one.

  Args:
    num_tokens: the number of tokens N that the layers have now.
    hidden_size: channels d of the keys.
    taus: τ of each layer that shares this count.
    theta: the function Θ.

  Returns:
    The new number of tokens, which is N if all τ are the released ones or can be moved into the values.
  """
  if theta != "l2_norm_gelu" or all(_is_released(tau, num_tokens, theta) for tau in taus):
    return num_tokens
  return max(num_tokens + min(num_tokens, hidden_size), math.ceil(max(float(tau) ** 2 for tau in taus)))


def rewritten_keys(keys: np.ndarray, tau: float, theta: str, num_tokens: int) -> np.ndarray:
  """The keys [num_tokens, d] that replace `keys` [N, d], for a count from `rows_needed`."""
  if num_tokens == len(keys):
    return keys
  factor = math.sqrt(max(num_tokens / float(tau) ** 2 - 1.0, 0.0))
  more = np.zeros((num_tokens - len(keys), keys.shape[1]), keys.dtype)
  root = factor * np.asarray(np.linalg.qr(keys.astype(np.float64), mode="r"))
  more[: len(root)] = root
  return np.concatenate([keys, more])


def rewritten_values(values: np.ndarray, tau: float, theta: str, num_tokens: int) -> np.ndarray:
  """The values [num_tokens, d] that replace `values` [N, d]."""
  if theta != "l2_norm_gelu" and not _is_released(tau, len(values), theta):
    values = (values.astype(np.float64) * (float(tau) / initial_tau(theta, len(values)))).astype(values.dtype)
  return np.concatenate([values, np.zeros((num_tokens - len(values), values.shape[1]), values.dtype)])


def rewritten_config(config: ModelConfig, taus: dict[str, np.ndarray]) -> ModelConfig:
  """Returns `config` with the token counts after the rewriting.

  Args:
    config: the configuration of the model before it.
    taus: τ of all layers [layer] by the path of the projection in our tree, such as `blocks/ffn`.

  Raises:
    ValueError: the released code does not have the model's GeLU.
  """
  if config.gelu != "erf":
    raise ValueError(
      f"gelu={config.gelu!r}: the released code has only erf; write a .safetensors without --released, "
      "which this package reads."
    )
  needed: dict[str, int] = {}
  for path, count in count_names(config).items():
    rows = rows_needed(getattr(config, count), config.hidden_size, taus[path], config.theta)
    needed[count] = max(rows, needed.get(count, 0))
  return config.grown(**needed)


def count_names(config: ModelConfig) -> dict[str, str]:
  """The name of the count of each layer of parameter tokens, by its path: `blocks/ffn` -> `ffn_tokens`."""
  rows = traverse_util.flatten_dict(declared(abstract_model(config), nnx.Param, "rows"), sep="/")
  return {path.rpartition("/")[0]: one.count for path, one in rows.items() if one is not None}


def _is_released(tau: float, num_tokens: int, theta: str) -> bool:
  return np.float32(tau) == np.float32(initial_tau(theta, num_tokens))
