"""The text of a compiled program as instructions, what calls what, and where a value comes from."""

import dataclasses
import functools
import re
from collections.abc import Iterator

# Operations that move or cast a value; their first operand is the value, the others say where.
_MOVES = frozenset(
  {
    "bitcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "dynamic-slice",
    "optimization-barrier",
    "reshape",
    "slice",
    "transpose",
  }
)
_BITS = {"pred": 8, "bf16": 16}
_COUNTS = ("s32[]", "u32[]")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = type opcode(operands), attributes`; `literal` is what stands between the parentheses."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  root: bool

  @property
  def op_name(self) -> str:
    """The JAX operation it comes from, '' if the compiler made it."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1).replace("\\'", "'") if found else ""

  def attribute(self, key: str) -> str | None:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """All computations by name; `entry` is the name of the one that runs."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often a run of the program executes it), callees after callers."""

    def walk(computation, times):
      for instruction in self.computations[computation].values():
        yield computation, instruction, times
        inner = times * self.trips(instruction, computation) if instruction.opcode == "while" else times
        for called in _called(instruction):
          yield from walk(called, inner)

    return walk(self.entry, 1)

  def trips(self, loop: Instruction, computation: str) -> int:
    """How often a loop's body runs. Raises ValueError where the text does not tell."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known.group(1))
    # A loop counts from 0 up to a constant, which the condition compares with: a scan by 1, a product that the TPU
    # compiler cut to overlap it with what it sends (a "windowed" one) also by 2.
    condition = self.computations[loop.attribute("condition")]
    counts = [int(i.literal) for i in condition.values() if i.opcode == "constant" and i.type[:5] in _COUNTS]
    compared = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
    if len(counts) != 1 or len(compared) != 1:
      raise ValueError(f"loop {loop.name} in {computation}: its number of trips is not a constant of the program.")
    return -(-counts[0] // self._stride(loop, condition[compared[0].operands[0]]))

  def _stride(self, loop: Instruction, counter: Instruction) -> int:
    """What a trip adds to the loop's counter, which the condition reads; 1 where it is not written as a sum."""
    body = loop.attribute("body")
    if counter.opcode != "get-tuple-element" or self._root(body).opcode != "tuple":
      return 1
    instructions = self.computations[body]
    following = instructions[self._root(body).operands[int(counter.attribute("index"))]]
    added = [
      int(i.literal)
      for i in map(instructions.get, following.operands)
      if following.opcode == "add" and i.opcode == "constant"
    ]
    return added[0] if added else 1

  def op_name(self, computation: str, instruction: Instruction) -> str:
    """The instruction's `op_name`, or where it is part of a fusion without one, the fusion's."""
    _, fusion = self._callers.get(computation, (None, None))
    return instruction.op_name or (fusion.op_name if fusion and fusion.opcode == "fusion" else "")

  def source(self, computation: str, name: str) -> str | None:
    """The argument of the program that value `name` is, or a part or cast of; None if it was computed."""
    place = computation, name, ()
    while place is not None:
      computation, name, _ = place
      instruction = self.computations[computation][name]
      if instruction.opcode == "parameter" and computation == self.entry:
        return instruction.op_name or name
      place = self._step_back(*place)
    return None

  def _step_back(self, computation: str, name: str, indices: tuple[int, ...]):
    """Where a value, element `indices` of the tuple `name`, lay before: (computation, name, indices)."""
    instruction = self.computations[computation][name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "get-tuple-element":
      return computation, operands[0], (int(instruction.attribute("index")), *indices)
    if opcode == "tuple" and indices:
      return computation, operands[indices[0]], indices[1:]
    if opcode in _MOVES:
      return computation, operands[0], () if opcode.startswith("copy-") else indices
    if opcode == "while":
      return self._before_loop(computation, instruction, indices)
    if opcode == "fusion":
      called = instruction.attribute("calls")
      return called, self._root(called).name, indices
    if opcode == "parameter" and computation in self._callers:
      where, call = self._callers[computation]
      if call.opcode == "while":
        return self._before_loop(where, call, indices)
      return where, call.operands[int(instruction.literal)], indices
    return None

  def _before_loop(self, computation: str, loop: Instruction, indices: tuple[int, ...]):
    """Where a value that a loop hands from trip to trip unchanged lay before it."""
    body = loop.attribute("body")
    next_trip = self._root(body)
    if not indices or next_trip.opcode != "tuple":
      return None
    kept = self.computations[body][next_trip.operands[indices[0]]]
    if kept.opcode != "get-tuple-element" or int(kept.attribute("index")) != indices[0]:
      return None
    return computation, loop.operands[0], indices

  def _root(self, computation: str) -> Instruction:
    return next(instruction for instruction in self.computations[computation].values() if instruction.root)

  @functools.cached_property
  def _callers(self) -> dict[str, tuple[str, Instruction]]:
    return {
      called: (name, instruction)
      for name, computation in self.computations.items()
      for instruction in computation.values()
      if instruction.opcode in ("while", "fusion", "call", "async-start")
      for called in _called(instruction)
    }


def parse(text: str) -> Module:
  """The module in `compiled.as_text()`."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if line[:1] not in ("", " ", "}") and line.endswith("{") and not line.startswith("HloModule"):
      name = _NAME.match(line.removeprefix("ENTRY ")).group(1)
      current = computations.setdefault(name, {})
      entry = name if line.startswith("ENTRY ") else entry
    elif current is not None and " = " in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
  if not entry:
    raise ValueError("no entry computation: this is not the text of a compiled program.")
  return Module(computations, entry)


def arrays(type_: str) -> list[tuple[str, tuple[int, ...], int]]:
  """(dtype, shape, bytes) of every array in a type."""
  found = []
  for dtype, sizes in _ARRAY.findall(type_):
    shape = tuple(int(size) for size in sizes.split(",") if size)
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
    count = bits
    for size in shape:
      count *= size
    found.append((dtype, shape, count // 8))
  return found


def _instruction(line: str) -> Instruction:
  line = line.strip()
  name, rest = line.removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  type_, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing - 1]
  opcode = rest[:opening]
  operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name.lstrip("%"), type_, opcode, operands, rest[closing:], inside, line.startswith("ROOT "))


def _closing(text: str, opening: int) -> int:
  """The index behind the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.end()
  raise ValueError(f"parenthesis not closed: {text[:80]}")


def _called(instruction: Instruction) -> list[str]:
  branches = [name for group in _BRANCHES.findall(instruction.attributes) for name in _NAME.findall(group)]
  return _CALLED.findall(instruction.attributes) + branches
