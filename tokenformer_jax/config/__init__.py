"""Configurations: frozen dataclasses, validated where they are made. Imports no jax.

A whole run is one `Config`. Experiments return it as an `ml_collections.ConfigDict` (`Config(...).to_config_dict()`),
so that any field can be set on the command line. The CLI turns the result back into the validated, frozen form with
`Config.from_dict`.
"""

from tokenformer_jax.config.data import BAD_TEXTS, PACKINGS, DataConfig
from tokenformer_jax.config.images import ImagesConfig
from tokenformer_jax.config.model import (
  COMPUTE_DTYPES,
  GELUS,
  KERNELS,
  REMAT_POLICIES,
  THETAS,
  TOKEN_COUNTS,
  ModelConfig,
)
from tokenformer_jax.config.run import Config
from tokenformer_jax.config.sizes import NAMED_SIZES
from tokenformer_jax.config.training import (
  GROWTH_METHODS,
  MOMENT_DTYPES,
  SCHEDULES,
  TAU_RULES,
  GrowthConfig,
  GrowthStage,
  MeshConfig,
  OptimizerConfig,
  TrainingConfig,
)

__all__ = [
  "BAD_TEXTS",
  "COMPUTE_DTYPES",
  "GELUS",
  "GROWTH_METHODS",
  "KERNELS",
  "MOMENT_DTYPES",
  "NAMED_SIZES",
  "PACKINGS",
  "REMAT_POLICIES",
  "SCHEDULES",
  "TAU_RULES",
  "THETAS",
  "TOKEN_COUNTS",
  "Config",
  "DataConfig",
  "GrowthConfig",
  "GrowthStage",
  "ImagesConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "TrainingConfig",
]
