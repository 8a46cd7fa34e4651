"""Quickstart."""

from tokenformer_jax.config import (
    Config, DataConfig, GrowthConfig, GrowthStage, ModelConfig, OptimizerConfig, TrainingConfig)


def get_config():
  return Config(
      model=ModelConfig.named("mini", vocab_size=384),
      data=DataConfig(source="python-sources", batch_size=16),
      optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=200),
      growth=GrowthConfig(stages=(GrowthStage(step=400, qkv_tokens=256, proj_tokens=256, ffn_tokens=1024),)),
      training=TrainingConfig(num_steps=800, log_every=10, eval_every=100, checkpoint_every=200),
  ).to_config_dict()
