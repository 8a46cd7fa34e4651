"""What growth does to each leaf, decided and checked before anything is touched."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from tokenformer_jax.config import TOKEN_COUNTS, GrowthConfig, ModelConfig
from tokenformer_jax.config.validation import flattened
from tokenformer_jax.growth.layers import TokenLayer, layer_of, leaves_by_path, path_name, token_axis, token_layers
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.theta import initial_tau

__all__ = ["LeafPlan", "NewRows", "check_growth", "leaves_by_path", "path_name", "plan_growth", "plan_leaves"]


class NewRows(enum.Enum):
  """What happens to a leaf: how its new rows begin, or what becomes of a τ. The value is what a report says."""

  NONE = "copied"
  ZERO = "zeros"
  RANDOM = "random"
  LIVE = "mixtures of the old"  # Random mixtures of old keys that lengthen every row of scores by the same factor.
  STEP = "this step"
  REPEATED = "the old ones again"
  PARTS = "parts of the old ones"  # Uneven parts that add up to the old row; the old row becomes one of them.
  SQUARED_PARTS = "squared parts of the old ones"
  NEW_TAU = "as of a new layer"
  SCALED_TAU = "scaled"


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """One leaf of a training state or of a model: its shape before and after, and how its new rows begin.

  Attributes:
    path: names joined by '/', e.g. `params/blocks/ffn/keys`.
    axis: the axis that grows; None where the shape stays.
    number: the standard deviation of random rows; the new value of a τ, or the factor on it.
  """

  path: str
  old_shape: tuple[int, ...]
  new_shape: tuple[int, ...]
  axis: int | None
  new_rows: NewRows
  number: float = 0.0


def plan_growth(
  shapes: Any, config: ModelConfig, new_config: ModelConfig, growth: GrowthConfig = GrowthConfig()
) -> dict[str, LeafPlan]:
  """`plan_leaves` for the model of `config` that becomes that of `new_config`.

  Raises:
    ValueError: see `check_growth` and `plan_leaves`.
  """
  check_growth(config, new_config, growth)
  layers = layers_of(config)
  return plan_leaves(shapes, layers, counts_of(layers, new_config), growth)


def plan_leaves(
  shapes: Any, layers: Mapping[str, TokenLayer], counts: Mapping[str, int], growth: GrowthConfig = GrowthConfig()
) -> dict[str, LeafPlan]:
  """The plan for a model, or for the training state of one, by leaf path.

  A leaf grows if it is a parameter of a layer that grows, or mirrors one (the optimizer's moments, the births of
  rows): its path ends in that parameter's.

  Args:
    shapes: a tree with the fields `params`, `tau` and, in a training run, `opt_state`, `born`, `step`; of arrays,
      streams or `jax.ShapeDtypeStruct`s.
    layers: the layers of the model before growth (`growth.layers.token_layers`).
    counts: the number of tokens that each layer is to have, by path.
    growth: how new rows begin; its stages are not used.

  Raises:
    ValueError: nothing grows, a layer would lose tokens, `growth.method` cannot add them, or a leaf's shape is not
      that of its layer.
  """
  _check_counts(layers, counts, growth)
  plan = {}
  for path, leaf in leaves_by_path(shapes).items():
    root, name = path.partition("/")[0], path.rpartition("/")[2]
    owner = layer_of(path, layers)
    if owner is None or counts[owner] == layers[owner].num_tokens:
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, NewRows.NONE)
      continue
    layer = layers[owner]
    if root == "tau":
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, *_tau_then(layer, counts[layer.path], growth))
      continue
    if name not in layer.rows:
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, NewRows.NONE)
      continue
    axis = 0 if root == "born" else token_axis(layer.axes[name], leaf.shape)
    old, new = (count // layer.rows[name].tokens for count in (layer.num_tokens, counts[layer.path]))
    if leaf.shape[axis] != old:
      raise ValueError(f"{path} {leaf.shape}: axis {axis} should have the model's {old} rows.")
    shape = (*leaf.shape[:axis], new, *leaf.shape[axis + 1 :])
    plan[path] = LeafPlan(path, leaf.shape, shape, axis, *_new_rows(path, layer, name, counts[layer.path], growth))
  return plan


def check_growth(config: ModelConfig, new_config: ModelConfig, growth: GrowthConfig = GrowthConfig()) -> None:
  """Raises ValueError unless `new_config` is `config` with more parameter tokens, and `growth.method` can add them."""
  wanted = flattened(new_config)
  for field, old in flattened(config).items():
    new = wanted[field]
    if field not in TOKEN_COUNTS and new != old:
      raise ValueError(f"{field}: {old!r} -> {new!r}: growth changes parameter tokens alone; keep {old!r}.")
  layers = layers_of(config)
  _check_counts(layers, counts_of(layers, new_config), growth)


def layers_of(config: ModelConfig) -> dict[str, TokenLayer]:
  """The layers of parameter tokens in the model of `config`, by path."""
  return token_layers(abstract_model(config))


def counts_of(layers: Mapping[str, TokenLayer], config: ModelConfig) -> dict[str, int]:
  """The number of tokens that `config` gives each layer, by path."""
  return {path: getattr(config, layer.count) for path, layer in layers.items()}


def _check_counts(layers: Mapping[str, TokenLayer], counts: Mapping[str, int], growth: GrowthConfig) -> None:
  changes = {path: (layer.num_tokens, counts[path]) for path, layer in layers.items()}
  if all(old == new for old, new in changes.values()):
    shown = {layer.count: layer.num_tokens for layer in layers.values()}
    raise ValueError(
      "growth changes nothing: " + ", ".join(f"{name}={number}" for name, number in shown.items())
      + " are the model's counts already; give at least one a larger value."
    )  # fmt: skip
  for path, (old, new) in changes.items():
    layer = layers[path]
    change = f"{layer.count}: {old} -> {new}"
    if new < old:
      raise ValueError(f"{change}: growth cannot take rows away; choose at least {old}.")
    if new == old:
      continue
    method = method_of(layer, new, growth)
    if layer.group_tokens:
      _check_groups(layer, new, method)
      continue
    if method == "duplicate" and new % old:
      raise ValueError(
        f"{change}: method='duplicate' repeats all rows; choose a whole multiple, "
        f"{new // old * old} or {(new // old + 1) * old}, or method='exact'."
      )
    if method == "exact" and layer.theta == "softmax":
      raise ValueError(
        "theta='softmax': new rows with zero keys would still get weight exp(0), so method='exact' cannot "
        "keep the function; method='duplicate' does, for whole multiples of the counts."
      )
    if method == "live" and layer.theta is None:
      raise ValueError(
        f"{layer.count}: method='live' keeps a norm over parameter tokens, and these rows are hidden units; choose "
        "method='exact'."
      )
    if method == "live" and layer.theta != "l2_norm_gelu":
      raise ValueError(
        f"theta={layer.theta!r}: method='live' keeps the function of l2_norm_gelu alone, whose norm is that of the "
        f"scores themselves; choose method={'duplicate' if layer.theta == 'softmax' else 'exact'!r}."
      )


def _check_groups(layer: TokenLayer, new: int, method: str) -> None:
  """Checks the growth of a layer whose tokens are in groups: any rows keep the function, for no token chooses them yet."""
  change, size = f"{layer.count}: {layer.num_tokens} -> {new}", layer.group_tokens
  if new % size:
    raise ValueError(
      f"{change}: the new tokens are no whole groups of {size}; choose {new // size * size} or {(new // size + 1) * size}."
    )
  why = {"duplicate": "copies of groups would be chosen in the place of others"}.get(method)
  if method == "live" and layer.theta != "l2_norm_gelu":
    why = f"theta={layer.theta!r}: it is for l2_norm_gelu alone"
  if why is not None:
    raise ValueError(f"{change} in groups of {size}: method={method!r}: {why}; choose method='exact'.")


def method_of(layer: TokenLayer, count: int, growth: GrowthConfig) -> str:
  """How a layer grows to `count` tokens: `growth.method`, or what `auto` means for this layer."""
  if growth.method != "auto":
    return growth.method
  enough = count - layer.num_tokens >= min(layer.num_tokens, layer.key_width)
  return "live" if layer.theta == "l2_norm_gelu" and enough else "exact"


def _new_rows(path: str, layer: TokenLayer, name: str, count: int, growth: GrowthConfig) -> tuple[NewRows, float]:
  root, rows = path.partition("/")[0], layer.rows[name]
  method, is_key = method_of(layer, count, growth), rows.role == "key"
  if rows.role == "router" and root == "params":
    return NewRows.RANDOM, rows.std_of(count)
  if rows.role in ("router", "prior"):
    return (NewRows.STEP if root == "born" else NewRows.ZERO), 0.0
  if method == "duplicate":
    # The parts of a value each have the whole value's gradient; the copies of a key share the key's. The lag of the
    # weights' average (`training.weight_average`) is a difference of weights and is divided like them.
    if root == "params" or "/lag/" in path:
      return (NewRows.REPEATED if is_key else NewRows.PARTS), 0.0
    if is_key and "/mu/" in path:
      return NewRows.PARTS, 0.0
    if is_key and "/nu/" in path:
      return NewRows.SQUARED_PARTS, 0.0
    return NewRows.REPEATED, 0.0
  if root != "params":
    return (NewRows.STEP if root == "born" else NewRows.ZERO), 0.0
  match method:
    case "released":
      return (NewRows.RANDOM, rows.std_of(count)) if rows.std != 0.0 else (NewRows.ZERO, 0.0)
    case "live":
      return (NewRows.LIVE if is_key else NewRows.ZERO), 0.0
  if layer.theta is None:
    # With zero keys a ReLU or a gated unit would never learn.
    return (NewRows.RANDOM, rows.std_of(count)) if is_key and rows.std != 0.0 else (NewRows.ZERO, 0.0)
  return (NewRows.ZERO, 0.0) if is_key else (NewRows.RANDOM, growth.value_scale * rows.std_of(count))


def _tau_then(layer: TokenLayer, new: int, growth: GrowthConfig) -> tuple[NewRows, float]:
  """What growth to `new` tokens makes of a layer's τ."""
  assert layer.theta is not None  # Only layers with a Θ have a τ.
  method = method_of(layer, new, growth)
  if method in ("duplicate", "live") or layer.group_tokens:  # Groups are as many of more: see `nn.token_groups`.
    return NewRows.SCALED_TAU, initial_tau(layer.theta, new) / initial_tau(layer.theta, layer.num_tokens)
  if method == "released" or growth.tau == "recomputed":
    return NewRows.NEW_TAU, initial_tau(layer.theta, new)
  return NewRows.NONE, 0.0
