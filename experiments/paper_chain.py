"""The paper's progressive scaling on OpenWebText2: 124M → 354M → 757M → 1.3B parameters, in one run (its Table 9).

    python -m tokenformer_jax.cli.train --config=experiments/paper_chain.py --workdir=runs/paper_chain \\
        --config.data.source=tokens:TRAIN --config.data.held_out_source=tokens:VALID --config.mesh.token=2
    python -m tokenformer_jax.cli.train --config=experiments/paper_chain.py:released --workdir=runs/released_chain …

TRAIN and VALID are folders of GPT-NeoX-20B ids that `cli.prepare` wrote. `:released` is the chain of the released
configurations, 354M → 757M of a deeper and wider model. Batch, length, rate and steps are the paper's (appendix D:
512 × 1024 tokens, 6e-4, 2,000 steps of warm-up; 600,000 steps, then 60,000 for each growth). The schedule is not: the paper's
restarts at each growth, while here the rate is constant and falls over the last steps of the run. The new rows' own warm-up
takes 2,000 steps for each old count's worth of them: 5,431, 2,533 and 1,555 steps at the three growths of the chain. `cli.compile_check`
reports the memory of all sizes. 4,850 is divisible by 2 and not by 4, so the mesh axis `token` can be 1 or 2 here.

Nobody has run this; it needs hundreds of TPU days. The parameter counts of all sizes are tested.
"""

from tokenformer_jax.config import (
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)

CHAINS = {"paper": ("124m", "354m", "757m", "1.3b"), "released": ("owt2-354m", "owt2-757m")}
FIRST_STEPS, GROWN_STEPS, DECAY = 600_000, 60_000, 20_000


def get_config(chain: str = "paper"):
  if chain not in CHAINS:
    raise ValueError(f"chain {chain!r} is unknown: choose one of {', '.join(CHAINS)}.")
  model, *bigger = (ModelConfig.named(name, compute_dtype="bfloat16", remat="dots") for name in CHAINS[chain])
  stages = tuple(
    GrowthStage(FIRST_STEPS + i * GROWN_STEPS, m.qkv_tokens, m.proj_tokens, m.ffn_tokens) for i, m in enumerate(bigger)
  )
  return Config(
    model=model,
    data=DataConfig(source="tokens:TRAIN", held_out_source="tokens:VALID", tokenizer="TRAIN", batch_size=512),
    optimizer=OptimizerConfig(learning_rate=6e-4, min_learning_rate=0.0, warmup_steps=2000, decay_steps=DECAY),
    growth=GrowthConfig(stages=stages, warmup_steps=2000),
    training=TrainingConfig(
      num_steps=FIRST_STEPS + len(bigger) * GROWN_STEPS,
      log_every=50,
      eval_every=1000,
      eval_batches=20,
      checkpoint_every=2000,
      sample_prompt="The",
      sample_tokens=200,
    ),
  ).to_config_dict()
