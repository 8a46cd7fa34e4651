"""Freed memory is kept for the next allocation, and a user's own setting stays."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from tokenformer_jax import allocator
allocator.keep_freed_memory_on_cpus()
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  bytearray(b"x") * 2**26
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(); faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc.")
def test_freed_memory_is_kept_unless_the_user_set_the_allocator():
  def faults(**variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=kept | variables, capture_output=True, check=True)
    return int(done.stdout)

  assert faults(JAX_PLATFORMS="cpu") < 10 < faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="2")
