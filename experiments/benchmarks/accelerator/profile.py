"""The most expensive operations of a program, from a trace of JAX's profiler."""

import collections
import glob
import os
import re
import shutil
import tempfile
import warnings

import jax

_MOST = 10
# The trace itself is kept beside the results up to this size.
_LARGEST_TRACE = 12 * 2**20
# An instruction `%name = … metadata={op_name="jit(train_step)/…"` of a compiled program.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\S+) .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
# Operations whose time is that of the operations inside them.
_CONTAINER = re.compile(r"(while|conditional|call)[.\d]*$")
# What a kernel's name says about it, first match first.
_KINDS = [
  ("attention", r"cudnn|flash|fmha|sdpa|splash|attention"),
  ("product", r"gemm|cublas|cutlass|nvjet|wgmma|\bdot|convolution|matmul|ynn"),
  ("copy", r"memcpy|memset|copy|transpose"),
  ("reduction or fusion with one", r"reduce"),
  ("elementwise", r"fusion|loop|wrapped|scatter|gather|dynamic"),
]


def add_profile(results, run, compiled_text: str, name: str, steps: int) -> None:
  """Traces `run()`, which runs `steps` steps, and adds tables of its ten most expensive operations and of their kinds.

  Args:
    results: the run's `Results`.
    run: waits for the device before it returns.
    compiled_text: of the program, which tells the source of each operation.
    name: of the program, for the titles.
    steps: the number of steps, by which times are divided.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
    if os.path.getsize(path) <= _LARGEST_TRACE:
      shutil.copy(path, results.folder / "train_step.xplane.pb")
    operations = _operations(path)
  sources = {match[1]: (match[2], match[3]) for match in _INSTRUCTION.finditer(compiled_text)}
  total = sum(nanoseconds for nanoseconds, _ in operations.values())
  kinds: collections.Counter = collections.Counter()
  for (operation, kernel), (nanoseconds, _) in operations.items():
    text = f"{kernel} {operation}".lower()
    kinds[next((kind for kind, pattern in _KINDS if re.search(pattern, text)), "other")] += nanoseconds
  for kind, nanoseconds in kinds.most_common():
    results.add(
      "train",
      f"Profile of {name}: kinds of operations, by the names of their kernels",
      kind=kind,
      **{"ms a step": nanoseconds / 1e6 / steps, "share, %": 100 * nanoseconds / total},
    )
  by_time = sorted(operations.items(), key=lambda item: -item[1][0])
  for (operation, kernel), (nanoseconds, calls) in by_time[:_MOST]:
    shape, source = sources.get(operation, ("", ""))
    results.add(
      "train",
      f"Profile of {name}: the {_MOST} most expensive operations",
      operation=operation,
      **{"ms a step": nanoseconds / 1e6 / steps, "share, %": 100 * nanoseconds / total, "calls a step": calls / steps},
      kernel=kernel[:80],
      result=re.sub(r"\{[^}]*\}", "", shape)[:60],
      source=source[-110:],
    )


def _operations(path: str) -> dict[tuple[str, str], list]:
  """(operation of the program, kernel) -> [nanoseconds, calls], of all devices; on a CPU, of its threads."""
  found: dict[tuple[str, str], list] = {}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # The binding of `stats` has no __module__.
    planes = list(jax.profiler.ProfileData.from_file(path).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    for plane in devices or planes:
      for line in plane.lines:
        # Other lines of a device, such as those of steps and modules, repeat the time of their operations.
        if devices and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
          continue
        for event in line.events:
          stats = dict(event.stats)
          operation = str(stats.get("hlo_op", event.name))
          if (not devices and "hlo_op" not in stats) or _CONTAINER.match(operation):
            continue
          if operation.startswith("command_buffer"):  # A GPU's kernels of many operations; `fusion_8` is of `fusion.8`.
            operation = re.sub(r"_(\d+)$", r".\1", event.name)
          entry = found.setdefault((operation, event.name), [0.0, 0])
          entry[0] += event.duration_ns
          entry[1] += 1
  if not found:
    raise ValueError(f"the trace has no operations of a device; its planes are {[plane.name for plane in planes]}.")
  return found
