"""A whole run in one configuration."""

import dataclasses
from typing import Any

import ml_collections

from tokenformer_jax.config.data import DataConfig
from tokenformer_jax.config.images import check_images
from tokenformer_jax.config.model import ModelConfig
from tokenformer_jax.config.training import GrowthConfig, MeshConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.validation import Checked, build, require


@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """One run.

  Attributes:
    model, data, optimizer, growth, training, mesh: the parts of the configuration.
    init_from: a work folder whose weights this run starts from, with a fresh optimizer; "" starts from random weights.
      With `model.ffn.group_tokens`, weights of a plain TokenFormer get a router; the function stays where `model.ffn.chosen`
      is the number of all groups.
  """

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  growth: GrowthConfig = GrowthConfig()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ""

  def validate(self) -> None:
    model = self.model
    self._check_unused()
    for stage in self.growth.stages:
      for field, count in stage.tokens.items():
        require(
          count >= getattr(model, field),
          f"stages: {field} at step {stage.step}",
          count,
          f"growth cannot remove rows; the model has {getattr(model, field)}.",
        )
      try:
        model = model.grown(**stage.tokens)
      except ValueError as error:
        raise ValueError(f"growth.stages: at step {stage.step}: {error}") from None
      require(
        stage.step < self.training.num_steps,
        "growth.stages: step",
        stage.step,
        f"the run ends at training.num_steps={self.training.num_steps}, so that this growth would never happen; "
        "raise num_steps, or remove the stage.",
      )
    check_images(self.model, self.data)
    accumulation = self.training.gradient_accumulation
    require(
      self.data.batch_size % accumulation == 0,
      "gradient_accumulation",
      accumulation,
      f"must divide data.batch_size={self.data.batch_size}.",
    )

  def _check_unused(self) -> None:
    """Checks that fields without a meaning for the model's task are at their defaults."""
    for part, field, task_has_it in (
      ("data", "mask_rate", self.model.task == "masked_token"),
      ("data", "mask_token", self.model.task == "masked_token"),
      ("optimizer", "z_loss", self.model.task != "classify"),
    ):
      value, default = getattr(getattr(self, part), field), getattr(type(getattr(self, part)), field)
      why = f"model.task={self.model.task!r} does not use it; leave it at {default!r}."
      require(task_has_it or value == default, f"{part}.{field}", value, why)

  def model_at(self, step: int) -> ModelConfig:
    """Returns the model's configuration after `step` updates and the growths that are due by then."""
    model = self.model
    for stage in self.growth.stages:
      if stage.step <= step:
        model = model.grown(**stage.tokens)
    return model

  def to_dict(self) -> dict[str, Any]:
    """Returns plain nested dicts, as stored in a work folder's config.json."""
    return dataclasses.asdict(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """Returns the mutable form that `get_config()` returns, for `--config.field=value` on the command line."""
    return ml_collections.ConfigDict(self.to_dict())

  @classmethod
  def from_dict(cls, fields: Any) -> "Config":
    """Returns the validated form of `to_dict()`.

    Raises:
      ValueError: an unknown key, with the nearest match, or a value that is refused.
    """
    if isinstance(fields, ml_collections.ConfigDict):
      fields = fields.to_dict()
    return build(cls, fields, "config")
