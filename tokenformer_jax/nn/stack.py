"""The blocks of a model: the first one where it differs, and all others under one scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.block import Block, Said
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import Tree, logical_axes, split, stack_layers, unstack_layers
from tokenformer_jax.nn.remat import LAYER_REMAT, gathered

# `(block, x, context) -> (x, what it observed)`.
Apply = Callable[[Block, jax.Array, Context], tuple[jax.Array, Any]]


def make_blocks(config: ModelConfig, *, rngs: nnx.Rngs) -> tuple[Block | None, Block]:
  """(the first block or None, the others as one module whose leaves have a leading layer axis)."""
  first = Block(config, is_first=True, rngs=rngs) if config.has_first_block else None
  others = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers - (first is not None), rngs)
  return first, others


def through_blocks(
  first: Block | None, blocks: Block, x: jax.Array, context: Context, config: ModelConfig, apply: Apply
) -> tuple[jax.Array, dict[str, Any]]:
  """Applies a function to each block in turn, the stacked ones under `jax.lax.scan`.

  Args:
    first, blocks: from `make_blocks`.
    x: the residual stream [B, T, d].
    context: where the tokens stand.
    config: of the model, for its `remat` and `compute_dtype`.
    apply: called in the place of each block.

  Returns:
    (the residual stream, what `apply` observed by the path of the block, `first` or `blocks`; under `blocks` each leaf
    has a leading layer axis).
  """
  observed: dict[str, Any] = {}
  if first is not None:
    graphdef, *leaves = split(first)
    x, observed["first"] = _layer(graphdef, logical_axes(first)[0], context, config, apply)(x, leaves)
  graphdef, *leaves = split(blocks)
  axes = jax.tree.map(lambda axes: axes[1:], logical_axes(blocks)[0], is_leaf=lambda node: isinstance(node, tuple))
  x, observed["blocks"] = jax.lax.scan(_layer(graphdef, axes, context, config, apply), x, leaves)
  return constrain(x, "batch", "time", None), observed


def _layer(graphdef: nnx.GraphDef, axes: Tree, context: Context, config: ModelConfig, apply: Apply) -> Callable:
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


def each_block(first: Block | None, blocks: Block, num_layers: int) -> nnx.List:
  """All blocks in order, as modules with leaves of their own."""
  others = unstack_layers(blocks, num_layers - (first is not None))
  return nnx.List([*([] if first is None else [first]), *others])
