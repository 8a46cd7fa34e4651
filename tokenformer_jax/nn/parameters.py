"""How a parameter is declared: once, with its shape, its logical axes and its initialiser.

Everything that needs one of the three (shardings, growth, decay masks, counts) reads it from here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]
Tree = dict[str, Any]


class Tau(nnx.Variable):
  """The scale inside Θ: state, not a parameter. No gradient, no decay; growth alone changes it."""


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: nnx.Initializer) -> nnx.Param:
  """A float32 parameter of `shape`, whose axes have the logical names `axes`."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def stack_layers(make_layer, num_layers: int, rngs: nnx.Rngs):
  """`num_layers` layers as one module whose leaves have a leading `layer` axis.

  Args:
    make_layer: `nnx.Rngs -> nnx.Module`; every layer draws from its own key.
  """
  abstract = nnx.eval_shape(lambda: make_layer(nnx.Rngs(0)))
  for _, variable in nnx.to_flat_state(nnx.state(abstract)):
    variable.set_metadata(axes=("layer", *variable.axes))
  graphdef = nnx.graphdef(abstract)
  keys = jax.random.split(rngs.params(), num_layers)
  return nnx.merge(graphdef, jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make_layer(nnx.Rngs(key)))))(keys))


def unstack_layers(stacked: nnx.Module, num_layers: int) -> nnx.List:
  """The modules that `stack_layers` made one of, each with leaves of its own."""
  graphdef, *trees = split(stacked)
  layers = [nnx.merge(graphdef, *layer) for layer in _unstacked(trees, num_layers)]
  for layer in layers:
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
      variable.set_metadata(axes=variable.axes[1:])
  return nnx.List(layers)


@functools.partial(jax.jit, static_argnames="num_layers")
def _unstacked(trees: list[Tree], num_layers: int) -> list[list[Tree]]:
  return [jax.tree.map(lambda leaf: leaf[index], trees) for index in range(num_layers)]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
  """(graph definition, parameters, τ) with both trees as plain nested dicts of arrays.

  `nnx.merge(graphdef, parameters, tau)` is the module again.
  """
  graphdef, parameters, tau = nnx.split(module, nnx.Param, Tau)
  return graphdef, nnx.to_pure_dict(parameters), nnx.to_pure_dict(tau)


def logical_axes(module: nnx.Module) -> tuple[Tree, Tree]:
  """The logical axes of every parameter and every τ, as trees like those of `split`."""
  _, parameters, tau = nnx.split(module, nnx.Param, Tau)
  return tuple(
    nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(v.axes), state, is_leaf=lambda v: isinstance(v, nnx.Variable)))
    for state in (parameters, tau)
  )
