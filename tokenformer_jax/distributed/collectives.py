"""What a compiled program sends between devices: every collective with its mesh axes, bytes and number of times."""

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
  """One array that one collective operation sends; the compiler's combiner merges several into one operation.

  Attributes:
    kind: one of `KINDS`.
    axes: the mesh axes that its groups of devices span, () where a group is one device.
    dtype, shape: of the larger side on one device: the result of an all-gather, the operand of the others.
    bytes: of that array.
    group_size: devices that exchange with each other.
    trips: how often a run of the program sends it: 1 outside of loops, else the product of their trips.
    backward: whether it comes from a gradient (recomputed forward operations count as backward).
    argument: the program's argument that is sent, such as "state.params['embedding']", None for computed values.
    operation: name of the operation, equal for the arrays that were merged.
    op_name: the JAX operation it comes from.
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
    return self.trips > 1

  @property
  def bytes_sent(self) -> float:
    """What one device sends in all trips with the ring algorithm."""
    rounds = {"all-reduce": 2 * (self.group_size - 1) / self.group_size, "collective-permute": 1.0}
    return self.trips * self.bytes * rounds.get(self.kind, (self.group_size - 1) / self.group_size)


def collectives(compiled_text: str, mesh: Mesh) -> list[Collective]:
  """The collectives of a program in the order of its text, an entry for every array.

  Args:
    compiled_text: `jit(f).lower(…).compile().as_text()`, of a CPU, GPU or TPU compilation.
    mesh: the mesh that the program was compiled for.

  Raises:
    ValueError: groups of devices or a loop's number of trips that the text does not tell.
  """
  module = hlo.parse(compiled_text)
  found = []
  chains: dict[str, list[int]] = {}
  for computation, instruction, trips in module.executed():
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    op_name = module.op_name(computation, instruction)
    axes, group_size = _axes(instruction, mesh)
    if group_size == 1:
      continue
    # The TPU compiler's reduce-scatter is a fusion of this name around an all-reduce and a slice.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    # The TPU compiler overlaps a collective with computations by writing it again into each of them, loops
    # included. All have one chain's number, and it is sent as often as the one that runs least.
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
  """(operand, (dtype, shape, bytes)) for every array sent, each as large as `Collective.bytes` says."""
  operands = [(name, array) for name in instruction.operands for array in hlo.arrays(instructions[name].type)]
  if kind == "all-gather":
    # A type of the -start form has operands and results.
    results = hlo.arrays(instruction.type)[-len(operands) :]
    return [(name, result) for (name, _), result in zip(operands, results)]
  if kind == "all-to-all" and len(operands) == group_size:
    # One array, cut into a piece for every device.
    name, (dtype, shape, size) = operands[0]
    return [(name, (dtype, (group_size, *shape), size * group_size))]
  return operands


def _axes(instruction: hlo.Instruction, mesh: Mesh) -> tuple[tuple[str, ...], int]:
  """The mesh axes along which a collective's groups lie, and the devices in a group."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
  groups = np.array(re.findall(r"(\d+),(\d+)", pairs.group(1)), int) if pairs else _groups(instruction, mesh)
  coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
  differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
  axes = tuple(axis for axis, along in zip(mesh.axis_names, differs) if along)
  return axes, math.prod(mesh.shape[axis] for axis in axes) if pairs else groups.shape[1]


def _groups(instruction: hlo.Instruction, mesh: Mesh) -> np.ndarray:
  """[group, device]: which devices exchange, from any of the three ways that XLA writes it."""
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
  raise ValueError(f"{instruction.name}: its groups of devices are not understood: {text[:200]}")


def _iota(text: str) -> np.ndarray:
  """`[2,4]T(1,0)`: 0, 1, 2, … in that shape, transposed."""
  shape, _, order = text.partition("T")
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return ids.transpose(_ints(order)) if order else ids


def _along(ids: np.ndarray, names: list[str], axes: list[tuple[str, str, str]]) -> np.ndarray:
  """Groups along named axes of an array of devices, or along parts `(devices before)size` of them."""
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
