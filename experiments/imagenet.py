"""ImageNet-1k with the released recipe, on 32 chips: ViT-B/16, and TokenFormer with as many and with more parameters.

    python -m tokenformer_jax.cli.train --config=experiments/imagenet.py:tokenformer-109m --workdir=runs/imagenet

Nobody has run this here. The data set is read through tensorflow-datasets, which makes it from the archives of
image-net.org (TFDS_DATA_DIR, see docs/images.md). The recipe is the supervised one from scratch of MAE (arXiv 2111.06377,
appendix A.2), with which the paper of TokenFormer reports on the 50,000 validation images (its table 2):

| name | model | parameters | tokens in each of q, k, v, proj | in the feed-forward | top-1 |
|---|---|---|---|---|---|
| `vit` | ViT-B/16 | 86,567,656 | – | 3072 units | 82.3 |
| `tokenformer-86m` | TokenFormer-B/16 | 86,446,312 | 576 | 2304 | 82.1 |
| `tokenformer-109m` | TokenFormer-B/16 | 108,859,624 | 728 | 2912 | 82.5 |

The token counts of the 109M model are not published; these keep the ratio of the 86M model. The recipe's stochastic depth
of 0.1 is missing here. docs/images.md has the least that a step takes, by `compile_check`.
"""

from tokenformer_jax.config import (
  Config,
  DataConfig,
  ImagesConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)

IMAGES, BATCH, EPOCHS, WARMUP_EPOCHS = 1_281_167, 32 * 128, 300, 20
MODELS = {
  "vit": ("150m", "vit", {}),
  "tokenformer-86m": ("124m", "tokenformer-vit", {}),
  "tokenformer-109m": ("124m", "tokenformer-vit", dict(qkv_tokens=728, proj_tokens=728, ffn_tokens=2912)),
}


def get_config(name: str = "tokenformer-109m"):
  size, preset, tokens = MODELS[name]
  return Config(
    model=ModelConfig.named(size, preset, compute_dtype="bfloat16", **tokens),
    data=DataConfig(
      source="tfds:imagenet2012",
      held_out_source="tfds:imagenet2012@validation",
      batch_size=BATCH,
      images=ImagesConfig(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=256,
        smallest_crop=0.08,
        flip=True,
        randaugment=2,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
      ),
    ),
    optimizer=OptimizerConfig(
      schedule="warmup_cosine",
      learning_rate=1.6e-3,
      min_learning_rate=1e-6,
      warmup_steps=WARMUP_EPOCHS * IMAGES // BATCH,
      weight_decay=0.3,
      beta2=0.95,
      clip_norm=float("inf"),
      ema_decay=0.9999,
    ),
    training=TrainingConfig(
      num_steps=EPOCHS * IMAGES // BATCH,
      log_every=100,
      eval_every=5 * IMAGES // BATCH,
      eval_batches=-(-50_000 // BATCH),
      checkpoint_every=IMAGES // BATCH,
      sample_tokens=0,
    ),
    mesh=MeshConfig(data=-1),
  ).to_config_dict()
