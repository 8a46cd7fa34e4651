"""About 5.5 million parameters on 65 English novels (13 million GPT-NeoX tokens), a BPE of 5,000 ids.

    export TOKENFORMER_DATA=FOLDER
    python -m tokenformer_jax.cli.train --config=experiments/novels.py --workdir=runs/novels

FOLDER holds `english_novels/{train,valid}.txt.gz`, books separated by lines that are <|endoftext|>, and
`tokenizers/gpt2_tiny_5k/{vocab.json,merges.txt}`. The text is tokenized at every start; to tokenize it once:

    for part in train valid; do
      python -m tokenformer_jax.cli.prepare --out=novels_$part \\
          --source="text:$TOKENFORMER_DATA/english_novels/$part.txt.gz#<|endoftext|>" \\
          --tokenizer=$TOKENFORMER_DATA/tokenizers/gpt2_tiny_5k
    done
    python -m tokenformer_jax.cli.train --config=experiments/novels.py --workdir=runs/novels \\
        --config.data.source=tokens:novels_train --config.data.held_out_source=tokens:novels_valid \\
        --config.data.tokenizer=novels_train

Two CPU cores that were also busy with other work (about 30 minutes of CPU time), November 2026, Python 3.11.7, jax 0.10.2,
float32: 600 steps of 4,096 tokens, 0.15 epochs. Held-out loss (valid.txt.gz, 163,840 tokens): 5.249 nats a token at
step 250, 4.730 at 500, 4.593 at 600, which is a perplexity of 98.8 for a BPE of 5,000 ids. The run was killed and resumed
twice, each time with a smaller number of steps, so that its rate fell to 0.8 of its peak between steps 400 and 500, and from
0.5 to 0 between 500 and 600.
"""

import os

from tokenformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig

MARKER = "<|endoftext|>"


def get_config():
  folder = os.environ.get("TOKENFORMER_DATA")
  if not folder:
    raise ValueError("TOKENFORMER_DATA is not set: name the folder that holds english_novels and tokenizers.")
  return Config(
    model=ModelConfig.named("small", vocab_size=5120),  # 5,000 ids, padded to a multiple of 128.
    data=DataConfig(
      source=f"text:{folder}/english_novels/train.txt.gz#{MARKER}",
      held_out_source=f"text:{folder}/english_novels/valid.txt.gz#{MARKER}",
      tokenizer=f"{folder}/tokenizers/gpt2_tiny_5k",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=100, decay_steps=200),
    training=TrainingConfig(
      num_steps=600,
      eval_every=250,
      eval_batches=40,
      checkpoint_every=250,
      sample_prompt="It was a dark and stormy night",
      sample_tokens=100,
    ),
  ).to_config_dict()
