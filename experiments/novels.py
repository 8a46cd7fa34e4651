"""About 5.5 million parameters on 65 English novels (13 million GPT-NeoX tokens), a BPE of 5,000 ids.

    export TOKENFORMER_DATA=FOLDER
    python -m tokenformer_jax.cli.train --config=experiments/novels.py --workdir=runs/novels

FOLDER holds `english_novels/{train,valid}.txt.gz`, books parted by lines that are <|endoftext|>, and
`tokenizers/gpt2_tiny_5k/{vocab.json,merges.txt}`. The text is tokenized anew at each start; to do it once:

    for part in train valid; do
      python -m tokenformer_jax.cli.prepare --out=novels_$part \\
          --source="text:$TOKENFORMER_DATA/english_novels/$part.txt.gz#<|endoftext|>" \\
          --tokenizer=$TOKENFORMER_DATA/tokenizers/gpt2_tiny_5k
    done
    python -m tokenformer_jax.cli.train --config=experiments/novels.py --workdir=runs/novels \\
        --config.data.source=tokens:novels_train --config.data.held_out_source=tokens:novels_valid \\
        --config.data.tokenizer=novels_train
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
      data=DataConfig(source=f"text:{folder}/english_novels/train.txt.gz#{MARKER}",
                      held_out_source=f"text:{folder}/english_novels/valid.txt.gz#{MARKER}",
                      tokenizer=f"{folder}/tokenizers/gpt2_tiny_5k"),
      optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=100, decay_steps=500),
      training=TrainingConfig(num_steps=900, eval_every=250, eval_batches=40, checkpoint_every=250,
                              sample_prompt="It was a dark and stormy night", sample_tokens=100),
  ).to_config_dict()
