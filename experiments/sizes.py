"""A named size as a run in bfloat16, for `compile_check`.

    python -m tokenformer_jax.cli.compile_check --config=experiments/sizes.py:450m --topology=v5e:1x1 \\
        --config.data.batch_size=4

The results for 150m, 450m, 1.5b and 7b are in docs/compile_check.md.
"""

from tokenformer_jax.config import Config, DataConfig, ModelConfig


def get_config(name: str = "150m"):
  model = ModelConfig.named(name, compute_dtype="bfloat16", remat="full")
  return Config(model=model, data=DataConfig(batch_size=8)).to_config_dict()
