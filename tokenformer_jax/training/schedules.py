"""Learning-rate schedules: a linear warm-up, then a constant rate with a linear decay or a cosine; and a triangle."""

import jax.numpy as jnp
import optax

from tokenformer_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """The learning rate of every update of a run of `num_steps` updates.

  Update n, counted from 1, has the rate learning_rate · n / warmup_steps during the warm-up, so the first update is not
  wasted, and the last update has exactly `min_learning_rate` if the schedule decays. The released training code
  (GPT-NeoX, `AnnealingLR`) counts from 0, so its first update has rate 0. A run that was started under such a schedule
  and is resumed under this one skips one step of the schedule.

  Args:
    config: shape of the schedule and its rates.
    num_steps: length of the run in updates.

  Returns:
    A function from the number of updates done before, int32 [], to the rate, float32 [].

  Raises:
    ValueError: the warm-up and the decay do not fit into the run.
  """
  check_schedule(config, num_steps)
  peak, floor, warmup = config.learning_rate, config.min_learning_rate, max(config.warmup_steps, 1)
  rise = optax.linear_schedule(0.0, peak, warmup)
  if config.schedule == "budget_triangle":

    def triangle(count):
      done = (count + 1) / num_steps
      rate = peak * jnp.minimum(0.25 + 0.75 * done / 0.75, (1.0 - done) / 0.25)
      return jnp.maximum(rate, floor)

    return triangle
  if config.schedule == "warmup_cosine":
    cosine = optax.cosine_decay_schedule(peak - floor, num_steps - warmup)
    by_number = optax.join_schedules([rise, lambda count: jnp.maximum(floor + cosine(count), floor)], [warmup])
  elif not config.decay_steps:
    by_number = optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
  else:
    fall_from = num_steps - config.decay_steps
    line = optax.linear_schedule(peak, floor, config.decay_steps)

    def fall(count):
      return jnp.maximum(line(count), floor)  # Rounding could leave the last rate below the minimum, even negative.

    by_number = optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, fall_from])
  return lambda count: by_number(count + 1)


def check_schedule(config: OptimizerConfig, num_steps: int) -> None:
  """Raises ValueError unless some update of a run of `num_steps` updates has the full rate before the decay begins."""
  if config.schedule == "budget_triangle":
    return
  decay = 1 if config.schedule == "warmup_cosine" else config.decay_steps
  needed = max(config.warmup_steps, 1) + decay
  if needed > num_steps:
    lengths = f"optimizer.warmup_steps={config.warmup_steps}"
    if config.schedule != "warmup_cosine":
      lengths += f" and optimizer.decay_steps={config.decay_steps}"
    raise ValueError(
      f"{lengths} do not fit into training.num_steps={num_steps}: the learning rate would never reach its peak "
      f"before it has to fall; lower them, or set training.num_steps to at least {needed}."
    )
