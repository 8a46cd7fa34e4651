"""The layers of parameter tokens in a model, as its parameters declare them."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.validation import nearest
from tokenformer_jax.nn.parameters import Axes, Rows, Tau, row_axis


@dataclasses.dataclass(frozen=True)
class TokenLayer:
  """One layer of N parameter tokens, or a stack of such layers.

  Attributes:
    path: where the model has it, names joined by '/', e.g. `blocks/ffn`.
    count: the name of the count that sets N.
    num_tokens: N.
    key_width: d_in, the number of channels of a key.
    theta: its Θ; None for hidden units, whose weights are an element-wise function of their scores.
    axes: name of each of its parameters, e.g. `keys` -> logical axes.
    rows: name of each of its parameters -> what its rows are.
  """

  path: str
  count: str
  num_tokens: int
  key_width: int
  theta: str | None
  axes: Mapping[str, Axes]
  rows: Mapping[str, Rows]

  @property
  def group_tokens(self) -> int:
    """The number of tokens in a group, of which a router chooses some; 0 without a router."""
    return max((rows.tokens for rows in self.rows.values() if rows.role == "router"), default=0)


def token_layers(model: nnx.Module) -> dict[str, TokenLayer]:
  """All layers of parameter tokens in an NNX module, by path; the module may be abstract (`nnx.eval_shape`).

  Raises:
    ValueError: a leaf with rows has no τ beside it, or its shape does not fit its axes.
  """
  state = nnx.state(model)
  variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
  thetas = {path.rpartition("/")[0]: v.theta for path, v in variables.items() if isinstance(v, Tau)}
  layers: dict[str, dict[str, nnx.Param]] = {}
  for path, variable in variables.items():
    if isinstance(variable, nnx.Param) and getattr(variable, "rows", None) is not None:
      layer, _, name = path.rpartition("/")
      layers.setdefault(layer, {})[name] = variable
  found = {}
  for path, parameters in layers.items():
    elementwise = all(v.rows.elementwise for v in parameters.values())
    if path not in thetas and not elementwise:
      raise ValueError(f"{path}: its parameter tokens have no τ beside them; declare one with nn.parameters.Tau.")
    counts = {name: v.rows.tokens * v.shape[token_axis(v.axes, v.shape)] for name, v in parameters.items()}
    names = {v.rows.count for v in parameters.values()}
    if len(set(counts.values())) != 1 or len(names) != 1:
      raise ValueError(f"{path}: its parameters have {counts} rows under the counts {sorted(names)}; expected one.")
    axes = {name: v.axes for name, v in parameters.items()}
    rows = {name: v.rows for name, v in parameters.items()}
    width = min(v.shape[-1] for v in parameters.values() if v.rows.role == "key" and v.axes[-1] != "param_token")
    found[path] = TokenLayer(path, names.pop(), next(iter(counts.values())), width, thetas.get(path), axes, rows)
  return found


def token_axis(axes: Axes, shape: tuple[int, ...]) -> int:
  """Which axis of an array its rows are on; axes in front of the declared ones are those of a stack."""
  axis = row_axis(axes)
  if axis is None:
    raise ValueError(f"axes {axes}: there are no rows of parameter tokens among them.")
  return axis + len(shape) - len(axes)


def layer_of(path: str, layers: Iterable[str]) -> str | None:
  """The layer that a leaf of a model or training state belongs to or mirrors, None if it is of no layer.

  A leaf mirrors a parameter if its path ends in that parameter's path, as an optimizer's moments do. Where the paths of
  several layers fit, the longest one is meant.

  Args:
    path: the leaf's path, e.g. `opt_state/1/mu/blocks/ffn/keys`.
    layers: the paths of all layers of the model; that of a model that is itself a layer is empty.
  """
  parent = "/" + path.rpartition("/")[0]
  return max((layer for layer in layers if parent.endswith(f"/{layer}".rstrip("/"))), key=len, default=None)


def new_counts(
  layers: Mapping[str, TokenLayer], by_path: Mapping[str, int] | None, by_name: Mapping[str, int | None]
) -> dict[str, int]:
  """The number of tokens that each layer is to have, by path.

  Args:
    layers: the model's layers.
    by_path: path, or pattern such as `layers/*/ffn`, -> number.
    by_name: name of a count -> number; None for one that stays.

  Raises:
    ValueError: the model has no such layer or count, two entries disagree, or a number is below 1.
  """
  if not layers:
    raise ValueError("the model has no layer of parameter tokens (tf.Pattention): there is nothing to grow or shrink.")
  chosen: dict[str, int] = {}
  given = {f"{name}={number}": ([path for path, layer in layers.items() if layer.count == name], number)
           for name, number in by_name.items() if number is not None}  # fmt: skip
  given |= {f"{pattern!r}: {number}": (fnmatch.filter(layers, pattern), number)
            for pattern, number in (by_path or {}).items()}  # fmt: skip
  for entry, (paths, number) in given.items():
    if not paths:
      counts = sorted({layer.count for layer in layers.values()})
      raise ValueError(
        f"{entry}: the model has no such layer; its counts are {', '.join(counts)}, its layers {', '.join(layers)}."
        + nearest(entry.partition("=")[0].partition(":")[0].strip("'"), [*counts, *layers])
      )
    if not isinstance(number, (int, np.integer)) or isinstance(number, bool) or number < 1:
      raise ValueError(f"{entry}: must be a whole number of at least 1.")
    for path in paths:
      if chosen.setdefault(path, number) != number:
        raise ValueError(f"{entry}: {path} is to have {chosen[path]} tokens by another entry; give it one number.")
  return {path: chosen.get(path, layer.num_tokens) for path, layer in layers.items()}


def with_counts(model: nnx.Module, counts: Mapping[str, int]) -> None:
  """Writes the numbers of tokens into the configuration of each module inside `model` that has a `ModelConfig`.

  Raises:
    ValueError: layers that share a count in the configuration are to have different numbers of tokens.
  """
  layers = token_layers(model)
  for prefix, module in nnx.iter_modules(model):
    config = getattr(module, "config", None)
    if not isinstance(config, ModelConfig):
      continue
    start = "".join(f"{name}/" for name in map(str, prefix))
    fields = {field.name for field in dataclasses.fields(config)}
    numbers: dict[str, int] = {}
    for path, layer in layers.items():
      if not path.startswith(start) or layer.count not in fields:
        continue  # The layer belongs to a module around the configured one and has a count of its own.
      if numbers.setdefault(layer.count, counts[path]) != counts[path]:
        raise ValueError(
          f"{path}: {counts[path]} tokens where another layer under {layer.count} has {numbers[layer.count]}: the "
          f"model's configuration has one number for all of them; give {layer.count}=… instead of paths."
        )
    module.config = config.grown(**numbers)  # type: ignore[attr-defined]  # nnx.Module declares no such attribute.


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """{'params/blocks/ffn/keys': leaf, …}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def path_name(path: tuple[Any, ...]) -> str:
  """A JAX key path as names joined by '/'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
