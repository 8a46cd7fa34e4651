"""How fast a run is: steps per second, and a trace for the profiler."""

import os
import tempfile
import time

import jax
from etils import epath

from tokenformer_jax.paths import is_uri, user_path

_TRACED_STEPS = 5


class Clock:
  """Measures steps per second since the last measurement or restart."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    self._step, self._start = step, time.perf_counter()

  def steps_per_second(self, step: int) -> float:
    """Returns 0 where no step was done since the last measurement."""
    rate = (step - self._step) / (time.perf_counter() - self._start)
    self.restart(step)
    return rate


class Trace:
  """A profile of the steps after the first `start`, in WORKDIR/profile of the first process; a context manager."""

  def __init__(self, workdir: str, wanted: bool):
    """Args: `wanted` False records nothing."""
    self._folder = user_path(workdir, "workdir") / "profile"
    # JAX's profiler writes to local folders alone.
    self._local = tempfile.TemporaryDirectory() if wanted and is_uri(self._folder) else None
    self._wanted, self._steps_left = wanted and jax.process_index() == 0, 0

  def __enter__(self) -> "Trace":
    return self

  def start(self) -> None:
    if self._wanted:
      options = jax.profiler.ProfileOptions()
      # Hooks in every Python thread can crash the process when a thread of the loader or of a save ends while they are
      # set or taken out (python/cpython#137400), and their events leave less room for the devices'.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._local.name if self._local else str(self._folder), profiler_options=options)
      self._wanted, self._steps_left = False, _TRACED_STEPS

  def step(self, state) -> None:
    """Called after every step with its result; ends the trace after the last traced step."""
    if self._steps_left == 1:
      jax.block_until_ready(state)
      self._stop()
    self._steps_left = max(self._steps_left - 1, 0)

  def __exit__(self, *error) -> None:
    if self._steps_left:
      self._stop()
    if self._local:
      self._local.cleanup()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    if not self._local:
      return
    for folder, _, names in os.walk(self._local.name):
      for name in names:
        source = epath.Path(folder) / name
        target = self._folder / os.path.relpath(source, self._local.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
