"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenformer_jax.config import nearest

# Logical axis -> mesh axes that split it.
RULES: dict[str, tuple[str, ...]] = {
    # Rows of a batch are independent, so fsdp splits them too: it shards memory, not work.
    "batch": ("data", "fsdp"),
    # The axis of growth: every device holds some tokens; Θ's norm and the output are sums over all.
    "param_token": ("token",),
    # With the tied logits [B, T, vocab] go the largest activations, which nothing else would divide.
    # A size that does not divide is an error, not a copy on every device: a vocabulary can be padded.
    "vocab": ("token",),
    "heads": ("token",),
    "embed": ("fsdp",),
    # A scan takes one layer after the other; norms are too small to pay for their gathering.
    "layer": (),
    "norm": (),
}


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
  """Where an array of `shape`, whose axes have the logical names `axes` (None: not split), lives.

  Args:
    name: the array's name, for messages.

  Raises:
    ValueError: an axis that is not in the table, does not divide, or wants a mesh axis already taken.
  """
  if len(axes) != len(shape):
    raise ValueError(f"{name}: axes {axes} and shape {tuple(shape)} differ in length.")
  spec: list[tuple[str, ...]] = []
  for axis, size in zip(axes, shape):
    if axis is not None and axis not in RULES:
      raise ValueError(f"{name}: logical axis {axis!r} is unknown: choose one of {', '.join(RULES)}."
                       + nearest(axis, RULES))
    mesh_axes = tuple(a for a in RULES[axis] if mesh.shape[a] > 1) if axis else ()
    parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
    if size % parts:
      below = size // parts * parts
      near = f"{below} or {below + parts}" if below else f"{parts}"
      raise ValueError(f"{name}: {axis}={size} cannot be split over the {parts} devices along mesh axis "
                       f"{' × '.join(mesh_axes)} of mesh {dict(mesh.shape)}; "
                       f"the nearest sizes that can: {near}.")
    for mesh_axis in mesh_axes:
      if any(mesh_axis in used for used in spec):
        raise ValueError(f"{name}: axes {axes} would use mesh axis {mesh_axis!r} twice.")
    spec.append(mesh_axes)
  # As jit spells the shardings of its results: a step is then not compiled again for its own output.
  while spec and not spec[-1]:
    spec.pop()
  return NamedSharding(mesh, PartitionSpec(*[mesh_axes or None for mesh_axes in spec]))


def tree_shardings(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> Any:
  """`sharding` of every leaf.

  Args:
    axes_tree: a tree of tuples of logical axes, as `nn.parameters.logical_axes` gives.
    shapes_tree: the same tree with arrays or `jax.ShapeDtypeStruct`s for leaves.
  """
  def of_leaf(path, leaf, axes):
    return sharding(mesh, axes, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="/"))
  return jax.tree_util.tree_map_with_path(of_leaf, shapes_tree, axes_tree)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...], name: str = "batch") -> NamedSharding:
  """Where an array [B, ...] of examples lives: split along B alone."""
  return sharding(mesh, ("batch",) + (None,) * (len(shape) - 1), shape, name)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())
