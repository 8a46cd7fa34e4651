"""mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of two images and their labels."""

import numpy as np

from tokenformer_jax.config.images import ImagesConfig


def mix(images: np.ndarray, labels: np.ndarray, config: ImagesConfig, rng: np.random.Generator) -> None:
  """Mixes two images with each other, in place: each is the first of its mixture.

  Args:
    images: [2, H, W, C].
    labels: [2, classes], shares of the classes.
    config: whose `mixup` and `cutmix` are the α of the two; where both are given, a coin decides.
    rng: draws λ and the rectangle.
  """
  use_cutmix = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
  alpha = config.cutmix if use_cutmix else config.mixup
  share = rng.beta(alpha, alpha)
  if use_cutmix:
    height, width = images.shape[1:3]
    half = np.sqrt(1 - share) / 2
    (top, bottom), (left, right) = (
      np.clip(np.round(rng.integers(size) + half * size * np.array([-1, 1])), 0, size).astype(int)
      for size in (height, width)
    )
    images[:, top:bottom, left:right] = images[::-1, top:bottom, left:right].copy()
    share = 1 - (bottom - top) * (right - left) / (height * width)  # The rectangle may lie partly outside.
  else:
    images[:] = np.float32(share) * images + np.float32(1 - share) * images[::-1]
  labels[:] = np.float32(share) * labels + np.float32(1 - share) * labels[::-1]
