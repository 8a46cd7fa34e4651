"""Compiles a run's programs for chips that are not present, to find out what each chip would hold and send."""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tokenformer_jax import data
from tokenformer_jax.config import Config
from tokenformer_jax.distributed.axes import batch_sharding, replicated
from tokenformer_jax.distributed.chips import Chip
from tokenformer_jax.distributed.collectives import Collective, collectives
from tokenformer_jax.distributed.topologies import (
  abstract_mesh,
  can_compile,
  kept_out_of_the_cache,
  parse_topology,
  slice_mesh,
)
from tokenformer_jax.growth.plan import check_growth
from tokenformer_jax.inference.decoding import bucket, decoding_programs
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.flops import product_flops, update_flops_per_token
from tokenformer_jax.training.program import Program, make_program

_PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Check:
  """One program on one chip of a slice. Bytes and FLOPs are per chip, `tokens` counts those of all chips.

  Attributes:
    name: which program.
    chip: the chip.
    held: bytes of the program's arguments by name.
    peak: the most bytes in use at once; None where nothing was compiled.
    flops: FLOPs of all products in the traced program divided by the number of chips. They include what remat computes
      again and the masked half of attention.
    model_flops: FLOPs that the model needs, with causal attention at half.
    sent: what goes to other chips; None where nothing was compiled.
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
    """Time of the products at the chip's published peak."""
    return self.flops / self.chip.peak_flops

  @property
  def memory_seconds(self) -> float:
    """Time to read every argument once, which no step can undercut."""
    return sum(self.held.values()) / self.chip.memory_bandwidth

  @property
  def sent_seconds(self) -> dict[tuple[str, ...], float]:
    """Time of what is sent, by mesh axes; each mesh axis is taken to have a closed ring of the slice to itself."""
    seconds: dict[tuple[str, ...], float] = defaultdict(float)
    for collective in self.sent or ():
      physical = min(len(collective.axes), self.chip.torus_axes)
      seconds[collective.axes] += collective.bytes_sent / (self.chip.axis_bandwidth * physical)
    return dict(seconds)

  @property
  def step_seconds(self) -> tuple[float, float]:
    """(time of a step that hides everything it sends behind the products, time of one that hides nothing)."""
    busy = max(self.compute_seconds, self.memory_seconds)
    sent = self.sent_seconds.values()
    return max([busy, *sent]), busy + sum(sent)


@dataclasses.dataclass(frozen=True)
class GrowthCheck:
  """What one chip holds while a run grows its state, in bytes.

  Attributes:
    name: which growth.
    chip: the chip.
    old, new: the training state before and after.
    peak: the most of both at once. `grow_state` makes the leaves one after the other and frees each old one when its
      successor exists. The temporary arrays of the program that makes one leaf are not counted.
  """

  name: str
  chip: Chip
  old: int
  new: int
  peak: int


def check(config: Config, topology: str) -> list[Check | GrowthCheck]:
  """Checks the programs of a run on a slice such as v5e:4x4, or on GPUs such as h100:8.

  Where nothing can be compiled for such chips (`can_compile`), the programs are only lowered, on an abstract mesh.

  Args:
    config: the run. Its mesh has to use all chips of the slice.
    topology: chip and sizes of the slice.

  Returns:
    The checks of the train step and, of a language model, the decode step. For a run that grows: those of the first model's train step, of
    every growth, and of the last and largest model's train step and decode step.

  Raises:
    ValueError: the topology is unknown, something does not divide, or a program does not fit into memory.
  """
  chip, _ = parse_topology(topology)
  mesh = (abstract_mesh if can_compile(chip) else slice_mesh)(config.mesh, topology)
  program = make_program(config, config.model, mesh)
  checks: list[Check | GrowthCheck] = [_train_step(config, program, mesh, chip)]
  since = ""
  for stage in config.growth.stages:
    model = config.model_at(stage.step)
    if model == program.model:
      continue
    check_growth(program.model, model, config.growth)
    before, program, since = program, make_program(config, model, mesh), f" from step {stage.step}"
    checks.append(_growth(f"growth at step {stage.step}", before, program, chip))
  if since:
    checks.append(_train_step(config, program, mesh, chip, f"train step{since}"))
  if not config.model.is_causal:
    return checks
  return [*checks, _decode_step(config, program, mesh, chip, f"decode step{since}")]


def _train_step(
  config: Config, program: Program, mesh: Mesh | AbstractMesh, chip: Chip, name: str = "train step"
) -> Check:
  state = program.shapes
  traced = program.train_step.trace(state, _batch(config, mesh))
  held = {"parameters": _bytes(state.params), "optimizer state": _bytes(state) - _bytes(state.params)}
  tokens = config.data.batch_size * program.model.seq_length
  peak, sent, _ = _compiled(name, traced, mesh, chip)
  return Check(
    name,
    chip,
    held,
    peak,
    product_flops(traced.jaxpr) / mesh.size,
    update_flops_per_token(program.model, config.data.mask_rate) * tokens / mesh.size,
    sent,
    tokens,
  )


def _growth(name: str, before: Program, after: Program, chip: Chip) -> GrowthCheck:
  old, new = (list(map(_bytes, jax.tree.leaves(program.shapes))) for program in (before, after))
  peak = max(sum(new[: done + 1]) + sum(old[done:]) for done in range(len(old)))
  if peak > chip.memory:
    raise _does_not_fit(name, f"it holds {peak / 2**30:.2f} GiB of {chip.memory / 2**30:.0f} in old and new state.")
  return GrowthCheck(name, chip, sum(old), sum(new), peak)


def _decode_step(config: Config, program: Program, mesh: Mesh | AbstractMesh, chip: Chip, name: str) -> Check:
  """One token for every row of a batch, with the cache where the program that reads the prompts has put it."""
  rows, (graphdef, leaves) = config.data.batch_size, _for_decoding(program)
  prefill, decode_step = decoding_programs(graphdef, mesh)

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))

  prompts = prefill.trace(leaves, ids(rows, _PROMPT), ids(rows), num_slots=bucket(program.model.seq_length))
  _, _, shardings = _compiled("program that reads the prompts", prompts, mesh, chip)
  _, cache = prompts.out_info
  if shardings is not None:
    cache = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), cache, shardings[1])
  traced = decode_step.trace(leaves, ids(rows), cache)
  held = {"parameters": _bytes(leaves), "cache" if shardings else "cache if it is not split": _bytes(cache)}
  peak, sent, _ = _compiled(name, traced, mesh, chip)
  return Check(
    name,
    chip,
    held,
    peak,
    product_flops(traced.jaxpr) / mesh.size,
    program.model.forward_flops_per_token * rows / mesh.size,
    sent,
    rows,
  )


def _for_decoding(program: Program):
  """(graph definition, leaves) of the model's form for decoding, with each layer sharded as it was in the stack."""
  stacked = [program.shapes.params, program.shapes.tau]
  graphdef, *shapes = split(nnx.eval_shape(lambda leaves: nnx.merge(program.graphdef, *leaves).for_decoding(), stacked))

  def layers_of(tree):
    layers = [tree["first"]] if "first" in tree else []
    length = len(program.model.pattern)
    pattern = [tree["blocks"]] if length == 1 else [tree["blocks"][str(index)] for index in range(length)]
    layers += pattern * ((program.model.num_layers - len(layers)) // length)
    rest = {name: branch for name, branch in tree.items() if name not in ("first", "blocks")}
    return {**rest, "blocks": dict(enumerate(layers))}

  sources = [layers_of(tree) for tree in stacked]

  def placed(shape, source):
    spec = PartitionSpec(*source.sharding.spec[source.ndim - shape.ndim :])
    return shape.update(sharding=NamedSharding(source.sharding.mesh, spec))

  return graphdef, jax.tree.map(placed, shapes, sources)


def _compiled(
  name: str, traced, mesh: Mesh | AbstractMesh, chip: Chip
) -> tuple[int | None, list[Collective] | None, Any]:
  """(peak bytes, collectives, shardings of the results); all are None where nothing can be compiled."""
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
  if peak > chip.memory:  # The compiler for TPUs refuses this itself, the one for GPUs does not.
    raise _does_not_fit(name, f"it takes {peak / 2**30:.2f} GiB of {chip.memory / 2**30:.0f}.")
  return peak, collectives(compiled.as_text(), mesh), compiled.output_shardings


def _does_not_fit(name: str, said: str) -> ValueError:
  return ValueError(
    f"the {name} does not fit: {said} Take more chips along fsdp or token, a smaller "
    "data.batch_size, or model.remat=full."
  )


def _batch(config: Config, mesh: Mesh | AbstractMesh) -> Any:
  def placed(array):
    sharding = batch_sharding(mesh, array.shape, length=config.model.seq_length)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  return jax.tree.map(placed, data.empty_batch(config))


def _bytes(tree: Any) -> int:
  """Bytes of a chip's part of all leaves; a leaf without a sharding counts as a whole."""

  def size(leaf):
    part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(part) * leaf.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))
