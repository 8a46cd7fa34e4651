"""How a parameter is declared: once, with everything that other packages need to know about it.

Shardings, growth, shrinking, decay masks and parameter counts read the declarations (`Axes`, `Rows`) from the module.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a parameter with an axis of rows (`row_axis`) says about them.

  Attributes:
    count: the name of the count that sets their number, e.g. `ffn_tokens`: growth changes all rows of one count.
    role: `key` or `value`, the side of the parameter tokens that the rows are; of a router over groups of tokens
      (`nn.token_groups`), whose rows stand for a group each, `router` or `prior`.
    std: the standard deviation of random new rows; None is 1/√N for a layer of N tokens.
    elementwise: whether a row's weight depends on that row alone, as a hidden unit's does. Such a layer has no τ.
    tokens: the number of tokens that a row stands for.
  """

  count: str
  role: str
  std: float | None
  elementwise: bool = False
  tokens: int = 1

  def std_of(self, num_tokens: int) -> float:
    """The standard deviation of the rows of a new layer with `num_tokens` parameter tokens."""
    return 1.0 / math.sqrt(num_tokens) if self.std is None else self.std


class Tau(nnx.Variable):
  """The scale inside Θ: state and not a parameter, with neither gradient nor decay.

  Growth may change it, and so does the rule of a training run that follows a growth (`training.tau`). Its metadata has
  `axes` and the layer's `theta`.
  """


def parameter(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: Axes,
  init: nnx.Initializer,
  rows: Rows | None = None,
  decayed: bool = True,
  active: float = 1.0,
) -> nnx.Param:
  """A float32 parameter.

  Args:
    shape: its shape.
    axes: the logical name of each axis, None for one that is never split.
    init: its initialiser.
    rows: what its rows are, where it has an axis of them.
    decayed: whether weight decay acts on it, as it does on matrices and not on norms, biases and gains.
    active: the share of tokens whose products read each of its numbers, below 1 in an expert.
  """
  return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, rows=rows, decayed=decayed, active=active)


def row_axis(axes: Axes) -> int | None:
  """Which axis of a parameter has the rows that growth adds to: parameter tokens, or groups of them; None for none."""
  return next((index for index, axis in enumerate(axes) if axis in ("param_token", "token_group")), None)


def is_matrix(axes: Axes) -> bool:
  """Whether a parameter with these axes is a matrix of the blocks: two axes or more beside that of a stack, all named.

  The tables of the vocabulary and of learned positions are none, for their rows are looked up; nor are norms, biases
  and gains.
  """
  own = [axis for axis in axes if axis != "layer"]
  return len(own) > 1 and None not in own and "vocab" not in own


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
  """The layers that `stack_layers` stacked, as modules with leaves of their own."""
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
  return declared(module, nnx.Param, "axes"), declared(module, Tau, "axes")


def declared(module: nnx.Module, kind: type[nnx.Variable], name: str, default: Any = None) -> Tree:
  """What each variable of a kind declares under a name, as a tree like those of `split`.

  Args:
    module: any NNX module; it may be abstract.
    kind: `nnx.Param` or `Tau`.
    name: `axes`, `rows` or `decayed`.
    default: what a variable says that was not made by `parameter`.
  """
  state = nnx.state(module, kind)
  return nnx.to_pure_dict(
    jax.tree.map(lambda v: v.replace(getattr(v, name, default)), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  )
