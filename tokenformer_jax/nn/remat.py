"""What the backward pass keeps, and what it computes again (`jax.checkpoint`)."""

import functools
from collections.abc import Callable

import jax

from tokenformer_jax.distributed.axes import constrain

# Names of the two products of a pattention (`checkpoint_name`), for policies to refer to.
SCORES, OUTPUT = "pattention_scores", "pattention_output"

# `ModelConfig.remat` -> the wrapper of a whole layer.
LAYER_REMAT: dict[str, Callable[[Callable], Callable]] = {
  "none": lambda layer: layer,
  "dots": lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(SCORES, OUTPUT)),
  "full": jax.checkpoint,
}


def keep_scores(function: Callable) -> Callable:
  """`function`, whose backward pass keeps pattention's scores and one number for each row, and recomputes the rest."""
  return jax.checkpoint(function, policy=_is_kept, prevent_cse=False)


def _is_kept(primitive, *_, name=None, **__):
  # A number for each row costs no memory, but where the tokens are split over devices it has been communicated.
  return primitive in (jax.lax.reduce_sum_p, jax.lax.reduce_max_p) or name == SCORES


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A parameter with all its channels on each device.

  Its gradient is not gathered: it is reduced into the parts that the devices keep.

  Args:
    axes: the logical axes of the parameter.
  """
  parameter = constrain(parameter, *axes)  # Otherwise XLA may gather it before it is cast to a narrower dtype.
  return constrain(parameter, *(None if axis == "embed" else axis for axis in axes))


gathered.defvjp(
  lambda parameter, axes: (gathered(parameter, axes), None),
  lambda axes, _, d_parameter: (constrain(d_parameter, *axes),),
)
