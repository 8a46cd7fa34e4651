"""The blocks of a model: the first one where it differs, and a pattern of one or several that repeats under one scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.block import Block, Said
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.depth_routing import RoutedBlock
from tokenformer_jax.nn.parameters import Tree, logical_axes, split, stack_layers, unstack_layers
from tokenformer_jax.nn.remat import LAYER_REMAT, gathered

AnyBlock = Block | RoutedBlock
# `(block, x, context) -> (x, what it observed)`.
Apply = Callable[[AnyBlock, jax.Array, Context], tuple[jax.Array, Any]]


class Pattern(nnx.Module):
  """Blocks that follow one another and repeat together, under the names `0`, `1`, …"""

  def __init__(self, blocks: list[AnyBlock]):
    for index, block in enumerate(blocks):
      setattr(self, str(index), block)


def make_blocks(config: ModelConfig, *, rngs: nnx.Rngs) -> tuple[Block | None, Block | RoutedBlock | Pattern]:
  """(the first block or None, the repeating ones as one module whose leaves have a leading axis of repetitions).

  Raises:
    ValueError: `compute_dtype` is float64 and JAX has 64-bit types switched off.
  """
  if config.compute_dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError("compute_dtype='float64': JAX has it switched off; set jax_enable_x64, or choose float32.")
  first = Block(config, is_first=True, rngs=rngs) if config.has_first_block else None

  def repeated(rngs: nnx.Rngs) -> Block | RoutedBlock | Pattern:
    blocks = [(RoutedBlock if routed else Block)(config, rngs=rngs) for routed in config.pattern]
    return blocks[0] if len(blocks) == 1 else Pattern(blocks)

  repeats = (config.num_layers - (first is not None)) // len(config.pattern)
  return first, stack_layers(repeated, repeats, rngs)


def _members(blocks: Block | RoutedBlock | Pattern) -> dict[str, AnyBlock]:
  """The stacked blocks of a repetition, by path."""
  if not isinstance(blocks, Pattern):
    return {"blocks": blocks}
  names = sorted((name for name in vars(blocks) if name.isdigit()), key=int)
  return {f"blocks/{name}": getattr(blocks, name) for name in names}


def through_blocks(
  first: Block | None,
  blocks: Block | RoutedBlock | Pattern,
  x: jax.Array,
  context: Context,
  config: ModelConfig,
  apply: Apply,
) -> tuple[jax.Array, dict[str, Any]]:
  """Applies a function to each block in turn, the repeating ones under `jax.lax.scan`.

  Args:
    first, blocks: from `make_blocks`.
    x: the residual stream [B, T, d].
    context: where the tokens stand.
    config: of the model, for its `remat` and `compute_dtype`.
    apply: called in the place of each block.

  Returns:
    (the residual stream, what `apply` observed by the path of the block: `first`, and `blocks` or, in a longer pattern,
    `blocks/0`, `blocks/1`, …, where each leaf has a leading axis of repetitions).
  """
  observed: dict[str, Any] = {}
  if first is not None:
    graphdef, *leaves = split(first)
    x, observed["first"] = _layer(graphdef, logical_axes(first)[0], context, config, apply)(x, leaves)
  layers, stacked = {}, {}
  for path, block in _members(blocks).items():
    graphdef, *stacked[path] = split(block)
    axes = jax.tree.map(lambda axes: axes[1:], logical_axes(block)[0], is_leaf=lambda node: isinstance(node, tuple))
    layers[path] = _layer(graphdef, axes, context, config, apply)

  def repetition(x, leaves):
    observed = {}
    for path, layer in layers.items():
      x, observed[path] = layer(x, leaves[path])
    return x, observed

  x, repeated = jax.lax.scan(repetition, x, stacked)
  return constrain(x, "batch", "time", None), observed | repeated


def run_block(block: AnyBlock, x: jax.Array, context: Context) -> tuple[jax.Array, Said]:
  """The usual `apply` of `through_blocks`: (the output of the block [B, T, d], what it says)."""
  x, _, said = block(x, context)
  return x, said


def _layer(graphdef, axes: Tree, context: Context, config: ModelConfig, apply: Apply):
  """One block as a function `(x, (parameters, τ)) -> (x, observed)`, rematerialised as `config.remat` says."""

  def layer(x_BxTxD, leaves):
    # Without this constraint the partitioner splits the channels along fsdp and gathers the batch.
    x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
    parameters, tau = leaves
    if config.remat != "none":
      # Gather the fsdp-sharded parameters once per layer; otherwise XLA gathers them again in the rematerialised
      # forward pass. Without remat this would keep the gathered parameters of all layers for the backward pass.
      parameters = jax.tree.map(
        lambda a, axes: gathered(a.astype(config.compute_dtype), axes) if "embed" in axes else a, parameters, axes
      )
    return apply(nnx.merge(graphdef, parameters, tau), x_BxTxD, context)

  return LAYER_REMAT[config.remat](layer)


def mean_over_layers(said: dict[str, Said]) -> Said:
  """What the blocks said, each name averaged over the layers that said it.

  Args:
    said: by path of the block, as `through_blocks` observed it.
  """
  names = dict.fromkeys(name for one in said.values() for name in one)
  return {
    name: jnp.mean(jnp.concatenate([jnp.ravel(one[name]) for one in said.values() if name in one])) for name in names
  }


def each_block(first: Block | None, blocks: Block | RoutedBlock | Pattern, config: ModelConfig) -> nnx.List:
  """All blocks in order, as modules with leaves of their own."""
  repeats = (config.num_layers - (first is not None)) // len(config.pattern)
  members = [unstack_layers(block, repeats) for block in _members(blocks).values()]
  others = [block for repetition in zip(*members) for block in repetition]
  return nnx.List([*([] if first is None else [first]), *others])
