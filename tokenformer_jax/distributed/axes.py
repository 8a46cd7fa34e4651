"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.distributed.mesh import MESH_AXES

# Logical axis -> the mesh axes that split it.
RULES: dict[str, tuple[str, ...]] = {
  # The rows of a batch are independent, so fsdp splits them too: fsdp shards memory and does not repeat work.
  "batch": ("data", "fsdp"),
  # The rows of a decode step beside its parameters, whose channels fsdp splits; attention and its cache are a "batch".
  "step": ("data",),
  # Every layer but attention between tokens treats the positions of a sequence independently.
  "time": ("sequence",),
  # The axis of growth. Every device holds some of the tokens; Θ's norm and the output are sums over all of them.
  "param_token": ("token",),
  # The tied logits [B, T, vocab] are among the largest activations, and no other axis would divide them.
  # A vocabulary that does not divide is an error and not a copy on every device, because it can be padded.
  "vocab": ("token",),
  "heads": ("token",),
  # Every device holds some experts with all of their parameter tokens; see `_without_rivals`.
  "expert": ("token",),
  # Each token's router compares all groups of parameter tokens; the groups themselves lie on `param_token`.
  "token_group": (),
  "embed": ("fsdp",),
  # A scan runs one layer after the other. Norms are too small to be worth gathering.
  "layer": (),
  "norm": (),
  "router": (),
}

_LOG = logging.getLogger(__name__)
_SAID: set[tuple] = set()  # (logical axis, size, sizes of the mesh) of everything that was said to stay whole.


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
  """The sharding of an array by the table.

  Args:
    mesh: the devices.
    axes: the logical name of each axis of the array; None for an axis that is not split.
    shape: the array's shape.
    name: the array's name, for messages.

  Raises:
    ValueError: an axis is not in the table or its size does not divide, or two axes want the same mesh axis.
  """
  if len(axes) != len(shape):
    raise ValueError(f"{name}: axes {axes} and shape {tuple(shape)} differ in length.")
  spec: list[tuple[str, ...]] = []
  for axis, size in zip(_without_rivals(axes), shape):
    if axis is not None and axis not in RULES:
      raise ValueError(
        f"{name}: logical axis {axis!r} is unknown: choose one of {', '.join(RULES)}." + nearest(axis, RULES)
      )
    mesh_axes, parts = _mesh_axes(mesh, axis), parts_of(mesh, axis)
    if size % parts:
      below = size // parts * parts
      near = f"{below} or {below + parts}" if below else f"{parts}"
      raise ValueError(
        f"{name}: {axis}={size} cannot be split over the {parts} devices along mesh axis "
        f"{_shown(mesh, axis)} of mesh {dict(mesh.shape)}; "
        f"the nearest sizes that can: {near}."
      )
    for mesh_axis in mesh_axes:
      if any(mesh_axis in used for used in spec):
        raise ValueError(f"{name}: axes {axes} would use mesh axis {mesh_axis!r} twice.")
    spec.append(mesh_axes)
  # jit drops trailing empty entries from the shardings of its results. Drop them here too; otherwise a step would be
  # compiled a second time for its own output.
  while spec and not spec[-1]:
    spec.pop()
  return NamedSharding(mesh, PartitionSpec(*[mesh_axes or None for mesh_axes in spec]))


def tree_shardings(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> Any:
  """The `sharding` of every leaf.

  Args:
    mesh: the devices.
    axes_tree: a tree of tuples of logical axes, such as `nn.parameters.logical_axes` returns.
    shapes_tree: the same tree with arrays or `jax.ShapeDtypeStruct`s for leaves.
  """

  def of_leaf(path, leaf, axes):
    return sharding(mesh, axes, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="/"))

  return jax.tree_util.tree_map_with_path(of_leaf, shapes_tree, axes_tree)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...], name: str = "batch", length: int | None = None) -> NamedSharding:
  """The sharding of an array [B] or [B, T, ...] of examples, which is split along B and T only.

  Args:
    length: T; an array whose second axis has another size, such as images, is split along B only. None takes the second
      axis for T.
  """
  axes = ("batch", "time")[: len(shape)] if length is None or shape[1:2] == (length,) else ("batch",)
  return sharding(mesh, axes + (None,) * (len(shape) - len(axes)), shape, name)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that is whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> Mesh | None:
  """The mesh of several devices that hold the arrays of a tree; None where one device holds them."""
  for leaf in jax.tree.leaves(tree):
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    if isinstance(mesh, Mesh) and mesh.size > 1 and set(MESH_AXES) <= set(mesh.axis_names):
      return mesh
  return None


def traced_on(mesh: Mesh, function: Callable) -> Callable:
  """`function` for `jax.jit`, traced with `mesh` in context so that the calls of `constrain` inside take effect."""

  @functools.wraps(function)
  def traced(*arguments, **settings):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments, **settings)

  return traced


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Tells the partitioner to shard `x` by the table; without one of our meshes in context it returns `x`.

  An axis whose size does not divide stays whole on every device, which is logged once (see `splits`).

  Args:
    x: an array.
    axes: the logical name of each axis of `x`; None for one that stays whole.
  """
  mesh = _mesh_in_context()
  if mesh is None:
    return x
  spec = [_splits(mesh, axis, size) or None for axis, size in zip(_without_rivals(axes), x.shape, strict=True)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def parts(axis: str) -> int:
  """The number of parts into which the mesh in context splits a logical axis; 1 without a mesh."""
  mesh = _mesh_in_context()
  return 1 if mesh is None else parts_of(mesh, axis)


def is_split(axis: str) -> bool:
  """Whether the mesh in context splits a logical axis."""
  return parts(axis) > 1


def splits(axis: str, size: int) -> tuple[str, ...]:
  """The mesh axes of the mesh in context that split a logical axis of this size.

  Where the size does not divide the result is (), and a warning is logged once for this axis, size and mesh: every
  device then holds all of the axis and does all of the work along it. A size of 1 is nothing to split and to warn of.
  """
  mesh = _mesh_in_context()
  return () if mesh is None else _splits(mesh, axis, size)


def parts_of(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
  """The number of parts into which `mesh` splits a logical axis."""
  return math.prod(mesh.shape[name] for name in _mesh_axes(mesh, axis))


def per_device(function: Callable, in_specs, out_specs) -> Callable:
  """`jax.shard_map` of `function` on the mesh in context; `function` itself without a mesh or on one device."""
  mesh = _mesh_in_context()
  if mesh is None or mesh.size == 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
  """cpu, gpu or tpu: the platform of a mesh, by default the one in context, which need not be present; JAX's own without."""
  device = (jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh).abstract_device
  return device.platform if device else jax.default_backend()


def whole_heads(mesh: Mesh, num_heads: int) -> str:
  """A note about a number of attention heads that the mesh cannot split; '' if it can.

  The log does not repeat what was asked for here.
  """
  parts = parts_of(mesh, "heads")
  if num_heads % parts == 0:
    return ""
  _SAID.add(_key(mesh, "heads", num_heads))
  return (
    f"{num_heads} heads cannot be split over the {parts} devices along mesh axis {_shown(mesh, 'heads')}: "
    f"q, k and v are whole on each, and each does all of the attention between tokens."
  )


def _without_rivals(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """The axes, with None for `param_token` where there is an `expert` axis, which alone then splits over `token`."""
  return tuple(None if axis == "param_token" and "expert" in axes else axis for axis in axes)


def _mesh_axes(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[str, ...]:
  """The mesh axes with several devices that the table gives to a logical axis."""
  return tuple(name for name in RULES[axis] if mesh.shape[name] > 1) if axis else ()


def _splits(mesh, axis: str | None, size: int) -> tuple[str, ...]:
  """`splits` on a given mesh."""
  parts = parts_of(mesh, axis)
  if size % parts == 0:
    return _mesh_axes(mesh, axis)
  if size > 1 and (key := _key(mesh, axis, size)) not in _SAID:
    _SAID.add(key)
    if jax.process_index() == 0:
      _LOG.warning(
        "%s=%d cannot be split over the %d devices along mesh axis %s: it stays whole on each, and each does all of "
        "the work along it.",
        axis,
        size,
        parts,
        _shown(mesh, axis),
      )
  return ()


def _key(mesh, axis: str | None, size: int) -> tuple:
  return axis, size, tuple(mesh.shape.items())


def _shown(mesh, axis: str | None) -> str:
  return " × ".join(_mesh_axes(mesh, axis))


def _mesh_in_context():
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(MESH_AXES) <= set(mesh.axis_names) else None
