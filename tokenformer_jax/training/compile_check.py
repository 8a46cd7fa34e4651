"""A run's train step and decode step, compiled for chips that are not there: what each holds and sends."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tokenformer_jax import data
from tokenformer_jax.config import Config
from tokenformer_jax.distributed.axes import batch_sharding, platform_of, replicated
from tokenformer_jax.distributed.chips import Chip
from tokenformer_jax.distributed.collectives import Collective, collectives
from tokenformer_jax.distributed.mesh import MESH_AXES, mesh_sizes
from tokenformer_jax.distributed.topologies import (
  abstract_mesh,
  can_compile,
  kept_out_of_the_cache,
  parse_topology,
  slice_mesh,
)
from tokenformer_jax.inference.generate import bucket, decoding_programs
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.flops import product_flops
from tokenformer_jax.training.program import Program, make_program

_PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Check:
  """One program on one chip of a slice. Bytes and FLOPs are a chip's, `tokens` are all chips'.

  Attributes:
    held: bytes of the program's arguments by name.
    peak: bytes in use at the fullest moment, None where nothing was compiled.
    flops: of the products as traced, recomputation and the masked half of attention included, divided by
      the number of chips.
    model_flops: the model's own, causal attention at half.
    sent: what goes to other chips, None where nothing was compiled.
    tokens: tokens of a step.
  """

  name: str
  chip: Chip
  held: dict[str, int]
  peak: int | None
  flops: float
  model_flops: float
  sent: list[Collective] | None
  tokens: int

  @property
  def compute_seconds(self) -> float:
    """At the published peak."""
    return self.flops / self.chip.peak_flops

  @property
  def memory_seconds(self) -> float:
    """To read every argument once: no step can be faster."""
    return sum(self.held.values()) / self.chip.memory_bandwidth

  @property
  def sent_seconds(self) -> dict[tuple[str, ...], float]:
    """By mesh axes, each with a physical axis of the slice to itself, in rings that are closed."""
    seconds = Counter()
    for collective in self.sent or ():
      physical = min(len(collective.axes), self.chip.torus_axes)
      seconds[collective.axes] += collective.bytes_sent / (self.chip.axis_bandwidth * physical)
    return dict(seconds)

  @property
  def step_seconds(self) -> tuple[float, float]:
    """(all that is sent hidden behind the products, nothing hidden)."""
    busy = max(self.compute_seconds, self.memory_seconds)
    sent = self.sent_seconds.values()
    return max([busy, *sent]), busy + sum(sent)


def check(config: Config, topology: str) -> list[Check]:
  """The checks of the train step and the decode step of `config` on a slice such as v5e:4x4, or GPUs such as h100:8.

  Where nothing can be compiled for such chips (`can_compile`), the programs are only lowered, on an abstract mesh.

  Raises:
    ValueError: the topology is unknown, something does not divide, or the program does not fit into memory.
  """
  chip, _ = parse_topology(topology)
  mesh = (abstract_mesh if can_compile(chip) else slice_mesh)(config.mesh, topology)
  program = make_program(config, config.model, mesh)
  train_step = _train_step(config, program, mesh, chip)
  with platform_of(mesh):
    return [train_step, _decode_step(config, program, mesh, chip)]


def _train_step(config: Config, program: Program, mesh: Mesh | AbstractMesh, chip: Chip) -> Check:
  state = program.shapes
  traced = program.train_step.trace(state, _batch(config, mesh))
  held = {"parameters": _bytes(state.params), "optimizer state": _bytes(state) - _bytes(state.params)}
  tokens = config.data.batch_size * config.model.seq_length
  peak, sent, _ = _compiled("train step", traced, mesh, chip)
  return Check(
    "train step",
    chip,
    held,
    peak,
    product_flops(traced.jaxpr) / mesh.size,
    3 * config.model.forward_flops_per_token * tokens / mesh.size,
    sent,
    tokens,
  )


def _decode_step(config: Config, program: Program, mesh: Mesh | AbstractMesh, chip: Chip) -> Check:
  """One token for every row of a batch; the cache lies where reading the prompts has left it."""
  rows, (graphdef, leaves) = config.data.batch_size, _for_decoding(program)
  prefill, decode_step = decoding_programs(graphdef)

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))

  prompts = prefill.trace(leaves, ids(rows, _PROMPT), ids(rows), num_slots=bucket(config.model.seq_length))
  _, _, shardings = _compiled("reading of prompts", prompts, mesh, chip)
  _, cache = prompts.out_info
  if shardings is not None:
    cache = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), cache, shardings[1])
  traced = decode_step.trace(leaves, ids(rows), cache)
  held = {"parameters": _bytes(leaves), "cache" if shardings else "cache, were it whole": _bytes(cache)}
  peak, sent, _ = _compiled("decode step", traced, mesh, chip)
  return Check(
    "decode step",
    chip,
    held,
    peak,
    product_flops(traced.jaxpr) / mesh.size,
    config.model.forward_flops_per_token * rows / mesh.size,
    sent,
    rows,
  )


def _for_decoding(program: Program):
  """(graph definition, leaves) of the model's form for decoding, its layers split as they were in the stack."""
  stacked = [program.shapes.params, program.shapes.tau]
  graphdef, *shapes = split(nnx.eval_shape(lambda leaves: nnx.merge(program.graphdef, *leaves).for_decoding(), stacked))

  sources = [{**tree, "blocks": dict.fromkeys(range(program.model.num_layers), tree["blocks"])} for tree in stacked]

  def placed(shape, source):
    spec = PartitionSpec(*source.sharding.spec[source.ndim - shape.ndim :])
    return shape.update(sharding=NamedSharding(source.sharding.mesh, spec))

  return graphdef, jax.tree.map(placed, shapes, sources)


def _compiled(
  name: str, traced, mesh: Mesh | AbstractMesh, chip: Chip
) -> tuple[int | None, list[Collective] | None, Any]:
  """(peak bytes, collectives, shardings of the results), all None where nothing can be compiled."""
  if isinstance(mesh, AbstractMesh):
    traced.lower(lowering_platforms=(chip.platform,))
    return None, None, None
  try:
    with kept_out_of_the_cache():
      compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise _does_not_fit(name, str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")) from None
  memory = compiled.memory_analysis()
  peak = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  )
  if peak > chip.memory:  # A TPU's compiler has refused it by now, a GPU's does not.
    raise _does_not_fit(name, f"it takes {peak / 2**30:.2f} GiB of {chip.memory / 2**30:.0f}.")
  return peak, collectives(compiled.as_text(), mesh), compiled.output_shardings


def _does_not_fit(name: str, said: str) -> ValueError:
  return ValueError(
    f"the {name} does not fit: {said} Take more chips along fsdp or token, a smaller "
    "data.batch_size, or model.remat=full."
  )


def _batch(config: Config, mesh: Mesh | AbstractMesh) -> data.Batch:
  shape = (config.data.batch_size, config.model.seq_length)

  def array(dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))

  documents = (jnp.int32, jnp.int32, jnp.float32) if config.data.packing == "documents" else ()
  return data.Batch(*map(array, (jnp.int32, jnp.int32, *documents)))


def _bytes(tree: Any) -> int:
  """Of a chip's part of all leaves; whole where a leaf has no sharding."""

  def size(leaf):
    part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(part) * leaf.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def report(config: Config, topology: str, checks: list[Check]) -> str:
  """What the checks say, in lines to read."""
  model = config.model
  sizes = mesh_sizes(config.mesh, math.prod(parse_topology(topology)[1]))
  mesh = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes) if size > 1) or "one chip"
  lines = [
    f"{model.num_parameters:,} parameters, {config.data.batch_size} rows of {model.seq_length}, "
    f"remat={model.remat}, {model.compute_dtype}, on {topology}, mesh {mesh}; each of its chips:"
  ]
  for one in checks:
    lines += [one.name, *_memory_lines(one), *_time_lines(one)]
  return "\n".join(lines)


def _memory_lines(one: Check) -> list[str]:
  sizes = {**one.held}
  if one.peak is not None:
    sizes["activations and the rest"] = one.peak - sum(one.held.values())
  lines = [f"  {name:26} {size / 2**30:10.4f} GiB" for name, size in sizes.items()]
  if one.peak is not None:
    lines.append(f"  {'peak':26} {one.peak / 2**30:10.4f} GiB of {one.chip.memory / 2**30:.0f}")
  return lines


def _time_lines(one: Check) -> list[str]:
  lines = [
    f"  {'products':26} {one.flops / 1e12:10.4f} TFLOP, the model's own {one.model_flops / 1e12:.4f}: "
    f"{1e3 * one.compute_seconds:.3f} ms",
    f"  {'arguments read once':26} {sum(one.held.values()) / 1e9:10.4f} GB: {1e3 * one.memory_seconds:.3f} ms",
  ]
  for axes, seconds in sorted(one.sent_seconds.items()):
    along = [collective for collective in one.sent if collective.axes == axes]
    kinds = Counter()
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
    return [*lines, f"  predicted step, were nothing sent: {steps[0]}"]
  return [
    *lines,
    f"  predicted step, all that is sent hidden: {steps[0]}",
    f"  predicted step, nothing hidden: {steps[1]}",
  ]
