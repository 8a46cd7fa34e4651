"""What the vectors of a dual encoder find: classes by prompts, and texts of images or images of texts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def zero_shot(
  images: Float[np.ndarray, "batch shared"], prompts: Float[np.ndarray, "class prompt shared"]
) -> Int[np.ndarray, "batch"]:
  """The class of each image: the one whose prompts are nearest to it.

  Args:
    images: vectors of the images.
    prompts: vectors of several prompts for each class, such as "a photo of a dress". The direction of their mean is that
      of the class (arXiv 2103.00020, section 3.1.4).
  """
  means = prompts.mean(axis=1)
  return np.argmax(images @ (means / np.linalg.norm(means, axis=-1, keepdims=True)).T, axis=1)


def recall_at(
  scores: Float[np.ndarray, "query item"],
  queries: Int[np.ndarray, "query"],
  items: Int[np.ndarray, "item"],
  ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
  """For each k, the share of queries with an item of their meaning among the k that score highest.

  Args:
    scores: of each query with each item.
    queries, items: a number for what each of them means. With a meaning for each pair this is the usual recall; with
      classes as meanings, any item of the class is right.
    ks: the numbers of items.

  Raises:
    ValueError: a k is larger than the number of items.
  """
  if max(ks) > len(items):
    raise ValueError(f"k={max(ks)}: there are only {len(items)} items to find; choose at most {len(items)}.")
  is_right = items[np.argsort(-scores, axis=1, kind="stable")] == queries[:, None]
  return {k: float(np.mean(np.any(is_right[:, :k], axis=1))) for k in ks}
