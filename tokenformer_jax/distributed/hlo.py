"""The text of a compiled program as instructions: which computation calls which, and where a value comes from."""

import dataclasses
import functools
import re
from collections.abc import Iterator

# Operations that move or cast a value: the first operand is the value, the others are positions.
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
  """One line of the text, `name = type opcode(operands), attributes`.

  Attributes:
    literal: the text between the parentheses.
    root: whether its value is that of its computation.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  root: bool

  @property
  def op_name(self) -> str:
    """The JAX operation that it comes from; '' if the compiler made it."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1).replace("\\'", "'") if found else ""

  def attribute(self, key: str) -> str | None:
    """The value of `key=value` in the attributes, None if there is none."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: for each computation by name, its instructions by name.
    entry: the name of the computation that the program starts with.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (computation, instruction, number of executions in one run of the program), callers before callees."""

    def walk(computation, times):
      for instruction in self.computations[computation].values():
        yield computation, instruction, times
        inner = times * self.trips(instruction, computation) if instruction.opcode == "while" else times
        for called in _called(instruction):
          yield from walk(called, inner)

    return walk(self.entry, 1)

  def trips(self, loop: Instruction, computation: str) -> int:
    """The number of times that the body of a loop runs. Raises ValueError where the text does not say it."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known.group(1))
    # A loop counts from 0 to a constant that its condition compares with. Scans count by 1; products that the TPU
    # compiler cut into windows, to overlap them with what it sends, may count by 2.
    condition = self.computations[loop.attribute("condition")]
    counts = [int(i.literal) for i in condition.values() if i.opcode == "constant" and i.type[:5] in _COUNTS]
    compared = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
    if len(counts) != 1 or len(compared) != 1:
      raise ValueError(f"loop {loop.name} in {computation}: its number of trips is not a constant of the program.")
    return -(-counts[0] // self._stride(loop, condition[compared[0].operands[0]]))

  def _stride(self, loop: Instruction, counter: Instruction) -> int:
    """The constant that a trip adds to the loop's counter, which the condition reads; 1 where there is no such sum."""
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
    """The `op_name` of an instruction; inside a fusion, that of the fusion if the instruction has none."""
    _, fusion = self._callers.get(computation, (None, None))
    return instruction.op_name or (fusion.op_name if fusion and fusion.opcode == "fusion" else "")

  def source(self, computation: str, name: str) -> str | None:
    """The argument of the program that a value is, or is a part or a cast of; None if it was computed."""
    place = computation, name, ()
    while place is not None:
      computation, name, _ = place
      instruction = self.computations[computation][name]
      if instruction.opcode == "parameter" and computation == self.entry:
        return instruction.op_name or name
      place = self._step_back(*place)
    return None

  def _step_back(self, computation: str, name: str, indices: tuple[int, ...]):
    """The previous place of a value: (computation, name, indices), where it is element `indices` of the tuple `name`."""
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
    """The place before a loop of a value that the loop passes from trip to trip unchanged; None if it changes."""
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
  """Reads `compiled.as_text()`. Raises ValueError for any other text."""
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
    raise ValueError("no entry computation: this is not the text of a compiled program; pass compiled.as_text().")
  return Module(computations, entry)


def arrays(type_: str) -> list[tuple[str, tuple[int, ...], int]]:
  """(dtype, shape, bytes) of each array in a type."""
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
  """The index after the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.end()
  raise ValueError(f"parenthesis not closed: {text[:80]}")


def _called(instruction: Instruction) -> list[str]:
  branches = [name for group in _BRANCHES.findall(instruction.attributes) for name in _NAME.findall(group)]
  return _CALLED.findall(instruction.attributes) + branches
