"""A whole run in one configuration."""

import dataclasses
from typing import Any

import ml_collections

from tokenformer_jax.config.data import DataConfig
from tokenformer_jax.config.model import ModelConfig
from tokenformer_jax.config.training import GrowthConfig, MeshConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.validation import Checked, build, require


@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """One run. `init_from` names a work folder whose weights this run starts from, optimizer fresh."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  growth: GrowthConfig = GrowthConfig()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ""

  def validate(self):
    model = self.model
    for stage in self.growth.stages:
      for field, count in stage.tokens.items():
        require(
          count >= getattr(model, field),
          f"stages: {field} at step {stage.step}",
          count,
          f"growth cannot take rows away; the model has {getattr(model, field)}.",
        )
      model = model.grown(**stage.tokens)
    accumulation = self.training.gradient_accumulation
    require(
      self.data.batch_size % accumulation == 0,
      "gradient_accumulation",
      accumulation,
      f"must divide data.batch_size={self.data.batch_size}.",
    )

  def model_at(self, step: int) -> ModelConfig:
    """The model's configuration after `step` updates and the growths due by then."""
    model = self.model
    for stage in self.growth.stages:
      if stage.step <= step:
        model = model.grown(**stage.tokens)
    return model

  def to_dict(self) -> dict[str, Any]:
    """Plain nested dicts, as stored in a work folder's config.json."""
    return dataclasses.asdict(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """The mutable form that `get_config()` returns, for `--config.field=value` on the command line."""
    return ml_collections.ConfigDict(self.to_dict())

  @classmethod
  def from_dict(cls, fields) -> "Config":
    """The validated form of `to_dict()`; unknown keys are refused with the nearest match."""
    if isinstance(fields, ml_collections.ConfigDict):
      fields = fields.to_dict()
    return build(cls, fields, "config")
