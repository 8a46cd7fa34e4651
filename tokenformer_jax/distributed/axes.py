"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.distributed.mesh import MESH_AXES

# Logical axis -> mesh axes that split it.
RULES: dict[str, tuple[str, ...]] = {
  # Rows of a batch are independent, so fsdp splits them too: it shards memory, not work.
  "batch": ("data", "fsdp"),
  # Positions of a sequence: all but attention between tokens treats each alone.
  "time": ("sequence",),
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
      raise ValueError(
        f"{name}: logical axis {axis!r} is unknown: choose one of {', '.join(RULES)}." + nearest(axis, RULES)
      )
    mesh_axes, parts = _parts(mesh, axis)
    if size % parts:
      below = size // parts * parts
      near = f"{below} or {below + parts}" if below else f"{parts}"
      raise ValueError(
        f"{name}: {axis}={size} cannot be split over the {parts} devices along mesh axis "
        f"{' × '.join(mesh_axes)} of mesh {dict(mesh.shape)}; "
        f"the nearest sizes that can: {near}."
      )
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
  """Where an array [B] or [B, T, ...] of examples lives: split along B and T alone."""
  axes = ("batch", "time")[: len(shape)]
  return sharding(mesh, axes + (None,) * (len(shape) - len(axes)), shape, name)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def traced_on(mesh: Mesh, function: Callable) -> Callable:
  """`function` for `jax.jit`, with `mesh` in context for the `constrain`s inside."""

  @functools.wraps(function)
  def traced(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return traced


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x`, told to the partitioner to live where the table says; an axis that is None or does not divide is whole.

  Without a mesh of ours in context nothing is told.
  """
  mesh = _mesh_in_context()
  if mesh is None:
    return x
  split = [_parts(mesh, axis) for axis in axes]
  spec = [
    mesh_axes if mesh_axes and size % parts == 0 else None
    for (mesh_axes, parts), size in zip(split, x.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def is_split(axis: str) -> bool:
  """Whether the mesh in context splits a logical axis."""
  mesh = _mesh_in_context()
  return mesh is not None and _parts(mesh, axis)[1] > 1


def splits(axis: str, size: int) -> tuple[str, ...]:
  """The mesh axes, of the mesh in context, that split a logical axis of this size; () where it stays whole."""
  mesh = _mesh_in_context()
  mesh_axes, parts = _parts(mesh, axis) if mesh is not None else ((), 1)
  return mesh_axes if size % parts == 0 else ()


def per_device(function: Callable, in_specs, out_specs) -> Callable:
  """`jax.shard_map` of `function` on the mesh in context; without one, or on one device, `function` itself."""
  mesh = _mesh_in_context()
  if mesh is None or mesh.size == 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
  """What the mesh in context consists of (it need not be here): cpu, gpu or tpu; without one, JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def platform_of(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
  """Within it `platform` is that of the mesh's devices, and nothing is split."""
  device = mesh.abstract_mesh.abstract_device
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=device))


def whole_heads(mesh: Mesh, num_heads: int) -> str:
  """What to tell of a number of heads that the mesh cannot split, '' if it can."""
  mesh_axes, parts = _parts(mesh, "heads")
  if num_heads % parts == 0:
    return ""
  return (
    f"{num_heads} heads cannot be split over the {parts} devices along mesh axis {' × '.join(mesh_axes)}: "
    f"q, k and v are whole on each, and each does all of the attention between tokens."
  )


def _parts(mesh, axis: str | None) -> tuple[tuple[str, ...], int]:
  """The mesh axes that split a logical axis, and into how many parts."""
  mesh_axes = tuple(a for a in RULES[axis] if mesh.shape[a] > 1) if axis else ()
  return mesh_axes, math.prod(mesh.shape[a] for a in mesh_axes)


def _mesh_in_context():
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(MESH_AXES) <= set(mesh.axis_names) else None
