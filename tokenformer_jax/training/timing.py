"""How fast a run is: steps a second, and a trace for the profiler."""

import time

import jax

from tokenformer_jax.paths import user_path

_TRACED_STEPS = 5


class Clock:
  """Steps a second since the last look or restart."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    self._step, self._start = step, time.perf_counter()

  def steps_per_second(self, step: int) -> float:
    """0 where no step was done since."""
    rate = (step - self._step) / (time.perf_counter() - self._start)
    self.restart(step)
    return rate


class Trace:
  """A profile of the steps that follow the first `start`, if `wanted`; the first process writes its own to
  WORKDIR/profile."""

  def __init__(self, workdir: str, wanted: bool):
    self._folder = str(user_path(workdir) / "profile")
    self._wanted, self._steps_left = wanted and jax.process_index() == 0, 0

  def __enter__(self) -> "Trace":
    return self

  def start(self) -> None:
    if self._wanted:
      jax.profiler.start_trace(self._folder)
      self._wanted, self._steps_left = False, _TRACED_STEPS

  def step(self, state) -> None:
    """After every step, with what it gave."""
    if self._steps_left == 1:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
    self._steps_left = max(self._steps_left - 1, 0)

  def __exit__(self, *error) -> None:
    if self._steps_left:
      jax.profiler.stop_trace()
