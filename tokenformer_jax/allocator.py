"""What this process does with memory that it frees: settings of glibc's allocator. Nothing happens where there is no glibc."""

import ctypes
import importlib.util
import os

# Parameters of mallopt(3), in malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory_on_cpus() -> None:
  """Makes this process keep what it frees, for its next allocation. Call it before JAX is imported.

  XLA on CPUs allocates the buffers of a step anew in every step. glibc gets large ones from the system each time, which
  clears every page of them. Where JAX has a plugin for accelerators, and where a user has set the allocator in the
  environment, nothing is changed.
  """
  plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
  is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
  if not is_set and (not plugins or os.environ.get("JAX_PLATFORMS") == "cpu"):
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1})


def return_freed_memory() -> None:
  """Makes this process return more of what it frees to the system. Call it before many threads are started.

  glibc keeps freed memory in an arena of the thread that freed it, and the many threads of tensorstore and XLA all free
  large buffers.
  """
  _set({_ARENA_MAX: 2})


def _set(values: dict[int, int]) -> None:
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    for parameter, value in values.items():
      mallopt(parameter, value)
