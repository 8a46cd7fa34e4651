"""Eight simulated devices, strict numerics and checked shapes for every test."""

import os
import pathlib

# JAX reads these when it is imported, here and in the processes that tests start.
_ROOT = pathlib.Path(__file__).parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# LLVM without optimisations compiles these small programs in half the time. Set XLA_FLAGS=--xla_backend_optimization_level=3
# to test the code that users run; `.ci/run` does so on its newest Python.
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# XLA ends a process whose simulated devices wait for one another for 40 seconds, as they may where the machine is busy.
if "--xla_cpu_collective_call_terminate" not in os.environ["XLA_FLAGS"]:
  os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=400"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import shapes  # noqa: E402, F401

# Annotated shapes and dtypes are checked at every call of these modules, which nothing may have imported before.
_CHECKED = ("inference.sampling", "kernels", "models", "nn", "parameter_tokens", "training.loss")
jaxtyping.install_import_hook([f"tokenformer_jax.{module}" for module in _CHECKED], "tests.shapes.check")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest begin first, so that all processes of pytest-xdist end at about the same time.
_LONGEST = (
  "test_processes",
  "test_loop",
  "test_meshes",
  "test_stream",
  "test_documents",
  "test_storage_kills",
  "test_real_text",
)


def pytest_collection_modifyitems(items):
  order = {name: index for index, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: order.get(item.path.stem, len(_LONGEST)))


def pytest_runtest_setup(item):
  """Further cases of what the usual tests show for some are run only where `-m every_combination` asks for them."""
  if item.get_closest_marker("every_combination") and "every_combination" not in item.config.option.markexpr:
    pytest.skip("a further case of what another test shows: pytest -m every_combination")


@pytest.fixture
def strict_dtypes():
  """Forbids implicit dtype promotion. Not for all tests, because `jax.nn.dot_product_attention` promotes bfloat16."""
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture
def unchecked_shapes():
  """Annotated shapes are not checked, as they are not for users: for tests of the package's own error messages."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def users_precision():
  """JAX's default matrix-product precision; at the tests' highest precision splash attention refuses bfloat16."""
  with jax.default_matmul_precision("default"):
    yield


@pytest.fixture
def data_folder() -> pathlib.Path:
  """The folder of real data that TOKENFORMER_DATA names. Without it the test is skipped."""
  folder = os.environ.get("TOKENFORMER_DATA", "")
  if not pathlib.Path(folder or "/nonexistent").is_dir():
    pytest.skip(f"TOKENFORMER_DATA={folder!r} names no folder of real data.")
  return pathlib.Path(folder)
