"""The legs of paper_protocol.py: which sizes are trained from which state, for how long and under which schedule."""

import dataclasses

SIZES = (1.0, 2.9, 6.1, 10.6)  # The paper's, in parameters without the embedding over those of the smallest.
FIRST, STAGE, SCRATCH = 60, 30, 300  # Units.


@dataclasses.dataclass(frozen=True)
class Leg:
  """A piece of a run at one size and under one schedule.

  Attributes:
    name: of the leg.
    size: 0 to 3.
    after: the leg whose last state it continues.
    start, stop: in units of the run's text.
    schedule: `constant`; `decay`, the last two thirds of a stage; or `cosine`, a restart with a fresh optimizer.
    growth: how its chain grows: `live`, `released`, or `net2net`, which grows a dense Transformer.
    length: of the run or stage that it belongs to, in units: from the first update of a run from scratch, from the
      last growth of a chain.
  """

  name: str
  size: int
  after: str | None
  start: int
  stop: int
  schedule: str
  growth: str
  length: int

  @property
  def is_dense(self) -> bool:
    return self.growth == "net2net"


def plan(token_flops: list[float], dense_flops: list[float]) -> list[Leg]:
  """All legs, the most important ones first.

  Args:
    token_flops, dense_flops: of a unit at each size.
  """
  return [
    *chain("live"),
    *alone("scratch 3", 3, SCRATCH),
    *[released(size) for size in range(4)],
    *alone("equal", 3, chain_flops(token_flops) / token_flops[3]),
    *alone("longer", 0, chain_flops(token_flops) / token_flops[0]),
    *chain("net2net"),
    *alone("net2net equal", 3, chain_flops(dense_flops) / dense_flops[3], "net2net"),
    *[branch("live", size) for size in (0, 1, 2)],
    *longer_stage("live", 60),
    *longer_stage("live", 15),
    released(3, 60),
    *alone("scratch 2", 2, SCRATCH),
    *alone("scratch 1", 1, SCRATCH),
    *alone("scratch 0", 0, SCRATCH),
    released(3, 15),
  ]


def chain_flops(unit_flops: list[float]) -> float:
  return FIRST * unit_flops[0] + STAGE * sum(unit_flops[1:])


def decay(length: int) -> int:
  return 2 * length // 3


def stage_of(size: int) -> tuple[int, int]:
  """First and last unit of a chain's stage."""
  start = FIRST + STAGE * (size - 1) if size else 0
  return start, start + (STAGE if size else FIRST)


def chain(growth: str) -> list[Leg]:
  """What the largest size needs."""
  return [leg for size in (0, 1, 2) for leg in trunk(growth, size)] + trunk(growth, 3)[:1] + [branch(growth, 3)]


def trunk(growth: str, size: int) -> list[Leg]:
  """A chain's stage at the full rate, in two legs: a branch may leave it where the decay begins."""
  start, stop = stage_of(size)
  fork = stop - decay(stop - start)
  before = f"{growth} trunk {size - 1}" if size else None
  first = Leg(f"{growth} fork {size}", size, before, start, fork, "constant", growth, stop - start)
  return [first, Leg(f"{growth} trunk {size}", size, first.name, fork, stop, "constant", growth, stop - start)]


def branch(growth: str, size: int) -> Leg:
  """The decay of a chain's stage."""
  start, stop = stage_of(size)
  fork = stop - decay(stop - start)
  return Leg(f"{growth} {size}", size, f"{growth} fork {size}", fork, stop, "decay", growth, stop - start)


def longer_stage(growth: str, length: int) -> list[Leg]:
  """The largest size's stage with another length."""
  start = stage_of(3)[0]
  fork = start + length - decay(length)
  return [
    Leg(f"{growth} fork 3 of {length}", 3, f"{growth} trunk 2", start, fork, "constant", growth, length),
    Leg(f"{growth} 3 of {length}", 3, f"{growth} fork 3 of {length}", fork, start + length, "decay", growth, length),
  ]


def released(size: int, length: int | None = None) -> Leg:
  """A stage of the chain that restarts."""
  start, stop = stage_of(size)
  name = f"released {size}" + (f" of {length}" if length else "")
  stop = start + length if length else stop
  before = f"released {size - 1}" if size else None
  return Leg(name, size, before, start, stop, "cosine", "released", stop - start)


def alone(name: str, size: int, length: float, growth: str = "live") -> list[Leg]:
  """A run from scratch."""
  length = round(length)
  fork = length - decay(length)
  return [
    Leg(f"{name} fork", size, None, 0, fork, "constant", growth, length),
    Leg(name, size, f"{name} fork", fork, length, "decay", growth, length),
  ]
