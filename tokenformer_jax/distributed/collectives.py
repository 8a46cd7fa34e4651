"""What a compiled program sends between devices: each collective with its mesh axes, bytes and number of executions."""

import dataclasses
import itertools
import math
import re

import numpy as np
from jax.sharding import Mesh

from tokenformer_jax.distributed import hlo

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One array that a collective operation sends. The compiler may merge several arrays into one operation.

  Attributes:
    kind: one of `KINDS`.
    axes: the mesh axes that its groups of devices span; () where a group is one device.
    dtype, shape: those of the larger side on one device, which is the result of an all-gather and the operand of others.
    bytes: the size of that array.
    group_size: number of devices that exchange with each other.
    trips: how often one run of the program sends it: 1 outside of loops, the product of their trips inside.
    backward: whether it belongs to a gradient; operations of the forward pass that are computed again do.
    argument: the argument of the program that is sent, such as "state.params['embedding']"; None for computed values.
    operation: name of the operation; it is equal for arrays that were merged.
    op_name: the JAX operation that it comes from.
  """

  kind: str
  axes: tuple[str, ...]
  dtype: str
  shape: tuple[int, ...]
  bytes: int
  group_size: int
  trips: int
  backward: bool
  argument: str | None
  operation: str
  op_name: str

  @property
  def in_loop(self) -> bool:
    """Whether it is sent more than once."""
    return self.trips > 1

  @property
  def bytes_sent(self) -> float:
    """Bytes that one device sends in all trips with the ring algorithm."""
    rounds = {"all-reduce": 2 * (self.group_size - 1) / self.group_size, "collective-permute": 1.0}
    return self.trips * self.bytes * rounds.get(self.kind, (self.group_size - 1) / self.group_size)


def collectives(compiled_text: str, mesh: Mesh) -> list[Collective]:
  """Finds the collectives of a program.

  Args:
    compiled_text: `jit(f).lower(…).compile().as_text()`, compiled for CPU, GPU or TPU.
    mesh: the mesh that the program was compiled for.

  Returns:
    One entry for each array that is sent, in the order of the text.

  Raises:
    ValueError: the text does not say which devices exchange or how often a loop runs.
  """
  module = hlo.parse(compiled_text)
  found: list[Collective] = []
  chains: dict[str, list[int]] = {}
  for computation, instruction, trips in module.executed():
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    op_name = module.op_name(computation, instruction)
    axes, group_size = _axes(instruction, mesh)
    if group_size == 1:
      continue
    # The TPU compiler writes a reduce-scatter as a fusion with this name around an all-reduce and a slice.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    # The TPU compiler overlaps a collective with computations, including loops, by repeating it inside each of them.
    # The repetitions have the same chain number, and the collective is sent as often as the one that runs least often.
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    if chain and chain.group(1) in chains:
      for i in chains[chain.group(1)]:
        found[i] = dataclasses.replace(found[i], trips=min(found[i].trips, trips))
      continue
    before = len(found)
    for name, (dtype, shape, size) in _arrays(kind, instruction, module.computations[computation], group_size):
      found.append(
        Collective(
          kind=kind,
          axes=axes,
          dtype=dtype,
          shape=shape,
          bytes=size,
          group_size=group_size,
          trips=trips,
          backward="transpose(" in op_name,
          argument=module.source(computation, name),
          operation=instruction.name,
          op_name=op_name,
        )
      )
    if chain:
      chains[chain.group(1)] = list(range(before, len(found)))
  return found


def _arrays(kind, instruction, instructions, group_size):
  """(name of the operand, (dtype, shape, bytes)) of every array sent, of the side that `Collective.bytes` counts."""
  operands = [(name, array) for name in instruction.operands for array in hlo.arrays(instructions[name].type)]
  if kind == "all-gather":
    # The type of an all-gather-start lists the operands and then the results.
    results = hlo.arrays(instruction.type)[-len(operands) :]
    return [(name, result) for (name, _), result in zip(operands, results)]
  if kind == "all-to-all" and len(operands) == group_size:
    # The operands are one array that was cut into a piece for every device.
    name, (dtype, shape, size) = operands[0]
    return [(name, (dtype, (group_size, *shape), size * group_size))]
  return operands


def _axes(instruction: hlo.Instruction, mesh: Mesh) -> tuple[tuple[str, ...], int]:
  """(the mesh axes along which the groups of a collective lie, the number of devices in a group)."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
  groups = np.array(re.findall(r"(\d+),(\d+)", pairs.group(1)), int) if pairs else _groups(instruction, mesh)
  coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
  differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
  axes = tuple(axis for axis, along in zip(mesh.axis_names, differs) if along)
  return axes, math.prod(mesh.shape[axis] for axis in axes) if pairs else groups.shape[1]


def _groups(instruction: hlo.Instruction, mesh: Mesh) -> np.ndarray:
  """Devices by group, int [group, device], from each of the ways in which XLA writes them."""
  text = instruction.attributes
  if "replica_groups={}" in text:
    return np.arange(mesh.size)[None]
  listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
  if listed:
    return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
  if iota:
    return _iota(iota.group(2)).reshape(_ints(iota.group(1)))
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", text
  )
  if named:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", named.group(1))}
    ids = (_iota(named.group(2)) if named.group(2) else np.arange(math.prod(sizes.values()))).reshape([*sizes.values()])
    return _along(ids, list(sizes), re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", named.group(3)))
  raise ValueError(f"{instruction.name}: its groups of devices cannot be read: {text[:200]}")


def _iota(text: str) -> np.ndarray:
  """Reads `[2,4]T(1,0)`: the numbers 0, 1, 2, … in that shape, transposed."""
  shape, _, order = text.partition("T")
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return ids.transpose(_ints(order)) if order else ids


def _along(ids: np.ndarray, names: list[str], axes: list[tuple[str, str, str]]) -> np.ndarray:
  """Groups of devices along the named axes of an array of devices, or along parts of axes.

  Args:
    ids: the array of devices.
    names: the names of its axes.
    axes: (name, devices before, size) of each axis that a group spans; the last two are '' for a whole axis and written
      `(devices before)size` for a part of one.
  """
  dims, grouped = [], []
  for name, size in zip(names, ids.shape):
    parts = {before: (int(before), int(part)) for axis, before, part in axes if axis == name and part}
    whole = any(axis == name and not part for axis, _, part in axes)
    edges = sorted({1, size, *itertools.chain.from_iterable((b, b * p) for b, p in parts.values())})
    for low, high in itertools.pairwise(edges):
      grouped.append(whole or any(b <= low and high <= b * p for b, p in parts.values()))
      dims.append(high // low)
  ids = ids.reshape(dims)
  inside = [i for i, along in enumerate(grouped) if along]
  outside = [i for i, along in enumerate(grouped) if not along]
  size = math.prod(dims[i] for i in inside)
  return ids.transpose(*outside, *inside).reshape(-1, size)


def _ints(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
