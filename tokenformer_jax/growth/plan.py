"""What growth does to each leaf, decided and checked before anything is touched."""

import dataclasses
import enum
from typing import Any

import jax
from flax import nnx

from tokenformer_jax.config import GrowthConfig, ModelConfig
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.block import KEY_STD, value_std
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.nn.theta import initial_tau

TOKEN_FIELDS = ("qkv_tokens", "proj_tokens", "ffn_tokens")


class NewRows(enum.Enum):
  """How a leaf goes on: the new rows of one that grows, or a τ."""

  NONE = "copied"
  ZERO = "zeros"
  RANDOM = "random"
  STEP = "this step"
  REPEATED = "the old ones again"
  PARTS = "parts of the old ones"  # Uneven, and together the old row; the old row becomes one of them.
  SQUARED_PARTS = "squared parts of the old ones"
  NEW_TAU = "as of a new layer"
  SCALED_TAU = "scaled"


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """One leaf of a training state: its shape before and after, and how its new rows begin.

  Attributes:
    path: names joined by '/', e.g. `params/blocks/ffn/keys`.
    axis: the axis that grows; None where the shape stays.
    number: of random rows the standard deviation; of a τ its new value, or the factor on it.
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
  """The plan for a state of leaf shapes `shapes` whose model is `config`, by leaf path.

  A leaf grows if it is a parameter with a `param_token` axis, or mirrors one (the optimizer's
  moments, rows' ages): if its path ends in that parameter's.

  Args:
    shapes: a state with fields `params`, `tau` and, in a training run, `opt_state`, `born`, `step`;
      arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: see `check_growth`; or a leaf's shape is not that of `config`.
  """
  check_growth(config, new_config, growth)
  axes, old_counts = _parameter_tokens(config)
  _, new_counts = _parameter_tokens(new_config)
  plan = {}
  for path, leaf in leaves_by_path(shapes).items():
    layer = path.split("/", 1)[-1].rpartition("/")[0]
    owner = next((name for name in axes if path.endswith("/" + name)), None)
    if path.startswith("tau/") and old_counts[f"{layer}/keys"] != new_counts[f"{layer}/keys"]:
      old, new = old_counts[f"{layer}/keys"], new_counts[f"{layer}/keys"]
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, *_tau_then(config.theta, old, new, growth))
      continue
    if owner is None or old_counts[owner] == new_counts[owner]:
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, NewRows.NONE)
      continue
    axis = 0 if path.startswith("born/") else axes[owner].index("param_token")
    if leaf.shape[axis] != old_counts[owner]:
      raise ValueError(f"{path} {leaf.shape}: axis {axis} should have the model's {old_counts[owner]} tokens.")
    shape = (*leaf.shape[:axis], new_counts[owner], *leaf.shape[axis + 1 :])
    plan[path] = LeafPlan(path, leaf.shape, shape, axis, *_new_rows(path, config, growth))
  return plan


def check_growth(config: ModelConfig, new_config: ModelConfig, growth: GrowthConfig = GrowthConfig()) -> None:
  """Raises ValueError unless `new_config` is `config` with more parameter tokens, and `growth.method` can add them.

  `exact` has no way for softmax; `duplicate` wants whole multiples.
  """
  if new_config == config:
    raise ValueError(
      "growth changes nothing: "
      + ", ".join(f"{f}={getattr(config, f)}" for f in TOKEN_FIELDS)
      + " are the model's counts already; give at least one a larger value."
    )
  for field in dataclasses.fields(ModelConfig):
    old, new = getattr(config, field.name), getattr(new_config, field.name)
    if field.name in TOKEN_FIELDS:
      if new < old:
        raise ValueError(f"{field.name}: {old} -> {new}: growth cannot take rows away; choose at least {old}.")
      if growth.method == "duplicate" and new % old:
        raise ValueError(
          f"{field.name}: {old} -> {new}: method='duplicate' repeats all rows; choose a whole multiple, "
          f"{new // old * old} or {(new // old + 1) * old}, or method='exact'."
        )
    elif new != old:
      raise ValueError(f"{field.name}: {old!r} -> {new!r}: growth changes parameter tokens alone; keep {old!r}.")
  if config.theta == "softmax" and growth.method == "exact":
    raise ValueError(
      "theta='softmax': new rows with zero keys would still get weight exp(0), so method='exact' cannot "
      "keep the function; method='duplicate' does, for whole multiples of the counts."
    )


def leaves_by_path(tree: Any, is_leaf=None) -> dict[str, Any]:
  """{'params/blocks/ffn/keys': leaf, …}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def path_name(path) -> str:
  """A JAX key path as names joined by '/'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _parameter_tokens(config: ModelConfig) -> tuple[dict[str, tuple], dict[str, int]]:
  """Logical axes, and number of parameter tokens, of each parameter that can grow, by path."""
  model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  shapes = leaves_by_path(split(model)[1])
  axes = leaves_by_path(logical_axes(model)[0], is_leaf=lambda node: isinstance(node, tuple))
  axes = {path: names for path, names in axes.items() if "param_token" in names}
  return axes, {path: shapes[path].shape[names.index("param_token")] for path, names in axes.items()}


def _new_rows(path: str, config: ModelConfig, growth: GrowthConfig) -> tuple[NewRows, float]:
  root, leaf = path.split("/")[0], path.split("/")[-1]
  if growth.method == "duplicate":
    # A value's parts each have the whole value's gradient; its copies' keys share the key's.
    if root == "params":
      return (NewRows.REPEATED if leaf == "keys" else NewRows.PARTS), 0.0
    if leaf == "keys" and "/mu/" in path:
      return NewRows.PARTS, 0.0
    if leaf == "keys" and "/nu/" in path:
      return NewRows.SQUARED_PARTS, 0.0
    return NewRows.REPEATED, 0.0
  if root == "params":
    if growth.method == "released":
      return NewRows.RANDOM, KEY_STD if leaf == "keys" else value_std(config)
    return (NewRows.ZERO, 0.0) if leaf == "keys" else (NewRows.RANDOM, growth.value_scale * value_std(config))
  return (NewRows.STEP if root == "born" else NewRows.ZERO), 0.0


def _tau_then(theta: str, old: int, new: int, growth: GrowthConfig) -> tuple[NewRows, float]:
  """What growth from `old` to `new` tokens makes of a layer's τ."""
  if growth.method == "duplicate":
    return NewRows.SCALED_TAU, initial_tau(theta, new) / initial_tau(theta, old)
  if growth.method == "released" or growth.tau == "recomputed":
    return NewRows.NEW_TAU, initial_tau(theta, new)
  return NewRows.NONE, 0.0
