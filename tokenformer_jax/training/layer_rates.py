"""Layer-wise rate decay: layers near the input learn more slowly (arXiv 2003.10555, 2106.08254), for fine-tuning."""

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.nn.parameters import Tree

# What stands behind the last block, by the names in every model; all other names beside the blocks stand before the first.
_BEHIND = ("final_norm", "head", "pooler", "classes")


def scale_layers(inner: optax.GradientTransformationExtraArgs, decay: float) -> optax.GradientTransformationExtraArgs:
  """`inner`, whose updates get a factor: 1 behind the last block, `decay` in it, `decay`² in the one before, ….

  What stands before the first block, such as embeddings and patches, has the factor of one more block. The state is that
  of `inner`, so that the factor may change when a run resumes.

  Args:
    inner: a transformation.
    decay: the factor of each layer over that of the layer behind it.
  """

  def update(updates, state, params=None, **extra):
    updates, state = inner.update(updates, state, params, **extra)
    return _scaled(updates, decay), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _scaled(updates: Tree, decay: float) -> Tree:
  blocks = updates["blocks"]
  # A pattern of several blocks has them by number; they repeat together along the leaves' first axis.
  members = [blocks[name] for name in sorted(blocks, key=int)] if "0" in blocks else [blocks]
  repeats, has_first = jax.tree.leaves(members[0])[0].shape[0], "first" in updates
  num_layers = has_first + repeats * len(members)

  def whole(tree: Tree, factor: float) -> Tree:
    return jax.tree.map(lambda update: update * jnp.asarray(factor, update.dtype), tree)

  def stack(tree: Tree, place: int) -> Tree:
    layers = has_first + place + len(members) * jnp.arange(repeats)
    factors = decay ** (num_layers - layers)
    return jax.tree.map(lambda u: u * factors.astype(u.dtype).reshape(-1, *[1] * (u.ndim - 1)), tree)

  scaled = {name: whole(tree, 1.0 if name in _BEHIND else decay ** (num_layers + 1)) for name, tree in updates.items()}
  if has_first:
    scaled["first"] = whole(updates["first"], decay**num_layers)
  stacks = [stack(tree, place) for place, tree in enumerate(members)]
  scaled["blocks"] = {str(place): tree for place, tree in enumerate(stacks)} if "0" in blocks else stacks[0]
  return scaled
