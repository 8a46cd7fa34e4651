"""The results of `compile_check` as text."""

import math
from collections import Counter

from tokenformer_jax.config import Config
from tokenformer_jax.distributed.chips import Chip
from tokenformer_jax.distributed.mesh import MESH_AXES, mesh_sizes
from tokenformer_jax.distributed.topologies import parse_topology
from tokenformer_jax.training.compile_check import Check, GrowthCheck


def report(config: Config, topology: str, checks: list[Check | GrowthCheck]) -> str:
  """The checks as text: the run in one line, then some lines for each check.

  Args:
    config, topology: what `check` was called with.
    checks: what it returned.
  """
  model = config.model
  sizes = mesh_sizes(config.mesh, math.prod(parse_topology(topology)[1]))
  mesh = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes) if size > 1) or "one chip"
  grown = [config.model_at(stage.step) for stage in config.growth.stages]
  sizes_of_model = " to ".join(f"{one.num_parameters:,}" for one in dict.fromkeys([model, *grown]))
  lines = [
    f"{sizes_of_model} parameters, {config.data.batch_size} rows of {model.seq_length}, "
    f"remat={model.remat}, {model.compute_dtype}, on {topology}, mesh {mesh}; each of its chips:"
  ]
  for one in checks:
    if isinstance(one, GrowthCheck):
      lines += [one.name, *_growth_lines(one)]
    else:
      lines += [one.name, *_memory_lines(one), *_time_lines(one)]
  return "\n".join(lines)


def _growth_lines(one: GrowthCheck) -> list[str]:
  return [*_sizes({"state before": one.old, "state after": one.new}), _peak(one.peak, one.chip)]


def _memory_lines(one: Check) -> list[str]:
  if one.peak is None:
    return _sizes(one.held)
  return [
    *_sizes({**one.held, "activations and the rest": one.peak - sum(one.held.values())}),
    _peak(one.peak, one.chip),
  ]


def _sizes(sizes: dict[str, int]) -> list[str]:
  return [f"  {name:26} {size / 2**30:10.4f} GiB" for name, size in sizes.items()]


def _peak(peak: int, chip: Chip) -> str:
  return f"  {'peak':26} {peak / 2**30:10.4f} GiB of {chip.memory / 2**30:.0f}"


def _time_lines(one: Check) -> list[str]:
  lines = [
    f"  {'products':26} {one.flops / 1e12:10.4f} TFLOP, the model's own {one.model_flops / 1e12:.4f}: "
    f"{1e3 * one.compute_seconds:.3f} ms",
    f"  {'arguments read once':26} {sum(one.held.values()) / 1e9:10.4f} GB: {1e3 * one.memory_seconds:.3f} ms",
  ]
  for axes, seconds in sorted(one.sent_seconds.items()):
    along = [collective for collective in one.sent or () if collective.axes == axes]
    kinds: Counter[str] = Counter()
    for collective in along:
      kinds[collective.kind] += collective.trips
    times = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    size = sum(collective.bytes_sent for collective in along)
    lines.append(f"  {'sent along ' + ' × '.join(axes):26} {size / 1e9:10.4f} GB in {times}: {1e3 * seconds:.3f} ms")
  steps = [
    f"{1e3 * seconds:.3f} ms, {one.tokens / seconds:,.0f} tokens/s, utilisation "
    f"{one.model_flops / one.chip.peak_flops / seconds:.1%}"
    for seconds in one.step_seconds
  ]
  if one.sent is None:
    return [*lines, f"  predicted step if nothing were sent: {steps[0]}"]
  return [
    *lines,
    f"  predicted step, all that is sent hidden: {steps[0]}",
    f"  predicted step, nothing hidden: {steps[1]}",
  ]
