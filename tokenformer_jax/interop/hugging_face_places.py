"""Where an array of Hugging Face's files stands in our tree, and how its axes lie there.

Our matrices are [d_in, d_out] in attention, and rows [hidden unit, channel] in the feed-forward. PyTorch's `Linear` is
[d_out, d_in], and GPT-2's `Conv1D` is [d_in, d_out].
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenformer_jax.config import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one of their arrays stands in our tree.

  Attributes:
    paths: the path of the leaf, or of several leaves whose last axes are joined in their array.
    transposed: whether their matrix is the transpose of ours.
    by_head: whether joined leaves alternate head by head, [q_0 | k_0 | v_0 | q_1 | …], and not as wholes.
    leading: the number of axes of size 1 in front of theirs.
  """

  paths: tuple[str, ...]
  transposed: bool = False
  by_head: bool = False
  leading: int = 0

  @property
  def is_rearranged(self) -> bool:
    """Whether rows of the leaf are no rows of their array."""
    return len(self.paths) > 1 or self.transposed or self.leading > 0

  def ours(self, array: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    """Their array as our leaves, in the order of `paths`; a leaf of a block is that of one layer."""
    array = array.reshape(array.shape[self.leading :])
    array = array.T if self.transposed else array
    if len(self.paths) == 1:
      return [array]
    parts, width = len(self.paths), config.head_dim if self.by_head else array.shape[-1] // len(self.paths)
    grouped = array.reshape(*array.shape[:-1], -1, parts, width)
    return [grouped[..., part, :].reshape(*array.shape[:-1], -1) for part in range(parts)]

  def theirs(self, leaves: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The inverse of `ours`."""
    array = leaves[0]
    if len(leaves) > 1:
      width = config.head_dim if self.by_head else array.shape[-1]
      grouped = [leaf.reshape(*leaf.shape[:-1], -1, width) for leaf in leaves]
      array = np.stack(grouped, axis=-2).reshape(*array.shape[:-1], -1)
    array = array.T if self.transposed else array
    return array.reshape((1,) * self.leading + array.shape)

  def our_shape(self, shape: Shape) -> Shape:
    """The shape of each of our leaves for the shape of their array."""
    shape = shape[self.leading :]
    *others, last = shape[::-1] if self.transposed else shape
    return (*others, last // len(self.paths))

  def shape(self, leaves: Sequence[Shape], config: ModelConfig) -> Shape:
    """The shape of their array for the shapes of our leaves."""
    shape = (*leaves[0][:-1], sum(leaf[-1] for leaf in leaves))
    return (1,) * self.leading + (shape[::-1] if self.transposed else shape)


class Patches(Place):
  """The kernel of patches, theirs [d, channel, height, width] and ours [height · width · channel, d]."""

  is_rearranged = True

  def ours(self, array, config):
    return [array.transpose(2, 3, 1, 0).reshape(-1, len(array))]

  def theirs(self, leaves, config):
    p, channels = config.vision.patch_size, config.vision.channels
    return leaves[0].reshape(p, p, channels, -1).transpose(3, 2, 0, 1)

  def our_shape(self, shape):
    return (shape[1] * shape[2] * shape[3], shape[0])

  def shape(self, leaves, config):
    p = config.vision.patch_size
    return (leaves[0][1], config.vision.channels, p, p)


def same(path: str, leading: int = 0) -> Place:
  return Place((path,), leading=leading)


def transposed(path: str) -> Place:
  return Place((path,), transposed=True)


def query_key_value(field: str, **arrangement: bool) -> Place:
  return Place(tuple(f"blocks/attention/{name}/{field}" for name in ("query", "key", "value")), **arrangement)
