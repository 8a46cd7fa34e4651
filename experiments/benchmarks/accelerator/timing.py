"""Times of asynchronous work on a device."""

import statistics
import time
from collections.abc import Callable

import jax


def seconds(function: Callable, *args, budget: float = 0.6, rounds: int = 5) -> float:
  """Median seconds of `function(*args)`, after it was compiled and has run twice.

  Calls of a round are dispatched together, so that the time to dispatch one is hidden where calls take longer.

  Args:
    function: a jitted function.
    budget: about how many seconds all rounds take together.
    rounds: the number of rounds.
  """

  def run(calls):
    begin = time.perf_counter()
    for _ in range(calls):
      result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls

  run(1)
  calls = max(1, min(200, int(budget / rounds / run(1))))
  return statistics.median(run(calls) for _ in range(rounds))


class Clock:
  """The end of a section, in `time.time()`."""

  def __init__(self, end: float):
    self.end = end

  @property
  def left(self) -> float:
    """Seconds until the section has to end."""
    return self.end - time.time()


def normal(seed: int, shape: tuple[int, ...], dtype="bfloat16") -> jax.Array:
  """Standard normal numbers; products of zeros can be faster than real ones."""
  return jax.random.normal(jax.random.key(seed), shape, dtype)
