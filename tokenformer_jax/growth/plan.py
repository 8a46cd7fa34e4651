"""What growth does to each leaf, decided and checked before anything is touched."""

import dataclasses
import enum
from typing import Any

from flax import nnx
import jax

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import logical_axes, split

_TOKEN_FIELDS = ("qkv_tokens", "proj_tokens", "ffn_tokens")


class NewRows(enum.Enum):
  """How the new rows of a leaf begin."""

  NONE = "copied"
  ZERO = "zeros"
  RANDOM = "random"
  STEP = "this step"


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """One leaf of a training state: its shape before and after, and how its new rows begin.

  Attributes:
    path: names joined by '/', e.g. `params/blocks/ffn/keys`.
    axis: the axis that grows; None where the leaf is copied.
  """

  path: str
  old_shape: tuple[int, ...]
  new_shape: tuple[int, ...]
  axis: int | None
  new_rows: NewRows


def plan_growth(shapes: Any, config: ModelConfig, new_config: ModelConfig) -> dict[str, LeafPlan]:
  """The plan for a state of leaf shapes `shapes` whose model is `config`, by leaf path.

  A leaf grows if it is a parameter with a `param_token` axis, or mirrors one (the optimizer's
  moments, rows' ages): if its path ends in that parameter's.

  Args:
    shapes: a state with fields `params` and, in a training run, `tau`, `opt_state`, `born`, `step`;
      arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: fewer tokens, nothing to grow, anything but token counts changed, or a Θ for which
      growth by zero keys is not exact.
  """
  check_growth(config, new_config)
  axes, old_counts = _parameter_tokens(config)
  _, new_counts = _parameter_tokens(new_config)
  plan = {}
  for path, leaf in leaves_by_path(shapes).items():
    owner = next((name for name in axes if path.endswith("/" + name)), None)
    if owner is None or old_counts[owner] == new_counts[owner]:
      plan[path] = LeafPlan(path, leaf.shape, leaf.shape, None, NewRows.NONE)
      continue
    axis = 0 if path.startswith("born/") else axes[owner].index("param_token")
    if leaf.shape[axis] != old_counts[owner]:
      raise ValueError(f"{path} {leaf.shape}: axis {axis} should have the model's {old_counts[owner]} tokens.")
    shape = (*leaf.shape[:axis], new_counts[owner], *leaf.shape[axis + 1:])
    plan[path] = LeafPlan(path, leaf.shape, shape, axis, _new_rows(path))
  return plan


def check_growth(config: ModelConfig, new_config: ModelConfig) -> None:
  """Raises ValueError unless `new_config` is `config` with more parameter tokens, and can have its function."""
  if new_config == config:
    raise ValueError("growth changes nothing: " + ", ".join(f"{f}={getattr(config, f)}" for f in _TOKEN_FIELDS)
                     + " are the model's counts already; give at least one a larger value.")
  for field in dataclasses.fields(ModelConfig):
    old, new = getattr(config, field.name), getattr(new_config, field.name)
    if field.name in _TOKEN_FIELDS:
      if new < old:
        raise ValueError(f"{field.name}: {old} -> {new}: growth cannot take rows away; choose at least {old}.")
    elif new != old:
      raise ValueError(f"{field.name}: {old!r} -> {new!r}: growth changes parameter tokens alone; keep {old!r}.")
  if config.theta == "softmax":
    raise ValueError("theta='softmax': new rows with zero keys would still get weight exp(0), so growth is not "
                     "exact; use l2_norm_gelu or gelu_l2_norm.")


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


def _new_rows(path: str) -> NewRows:
  root, leaf = path.split("/")[0], path.split("/")[-1]
  if root == "params":
    return NewRows.ZERO if leaf == "keys" else NewRows.RANDOM
  return NewRows.STEP if root == "born" else NewRows.ZERO
