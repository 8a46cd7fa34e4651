"""Updates that a run skipped because their numbers were bad, and when there are too many of them."""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tokenformer_jax.config import TrainingConfig

_WINDOW = 100  # Good losses whose mean a spike is compared with.


class Diverged(FloatingPointError):
  """A run that cannot go on: too many of its updates in a row were skipped, or its last one was."""


class Skips:
  """Counts skipped updates, and says above which loss the next one is to be skipped.

  Every process observes the same numbers and therefore decides alike.

  Attributes:
    in_a_row: how many of the newest updates were skipped.
    first_step: the first of these.
  """

  def __init__(self, training: TrainingConfig, losses: Sequence[tuple[int, float]] = ()):
    """Args: `losses` is what `losses` of the run gave before it was stopped."""
    self._factor, self._most = training.spike_factor, training.max_skips_in_a_row
    self._losses = collections.deque([(step, loss) for step, loss in losses], maxlen=_WINDOW)
    self._unreported = self.in_a_row = self.first_step = 0

  def losses(self) -> list[tuple[int, float]]:
    """(update, loss) of the newest good updates, as JSON can represent them; empty where no spikes are skipped."""
    return list(self._losses)

  def forget_losses(self) -> None:
    """Called where the loss may jump for a good reason, such as growth."""
    self._losses.clear()

  def most_loss(self, step: int) -> np.float32:
    """The loss above which update number `step` is skipped: `spike_factor` times the mean of the newest good losses.

    The loss of the update before is left out, because it is not known yet when this one is dispatched; so it is after a
    stop too, and the resumed run decides as the run that was never stopped.
    """
    losses = [loss for at, loss in self._losses if at <= step - 2]
    return np.float32(self._factor * np.mean(losses) if losses else math.inf)

  def observe(self, step: int, metrics: Mapping[str, np.ndarray]) -> str:
    """Takes the metrics of the next update.

    Returns:
      A line that says that the update was skipped, or "".
    """
    if not metrics["skipped"]:
      self.in_a_row = 0
      if self._factor:
        self._losses.append((step, float(metrics["loss"])))
      return ""
    self._unreported += 1
    self.in_a_row += 1
    if self.in_a_row == 1:
      self.first_step = step
    return (
      f"step {step}: update skipped, number {self.in_a_row} in a row: loss {metrics['loss']:.6g}, gradient norm "
      f"{metrics['grad_norm']:.6g}."
    )

  def are_too_many(self) -> bool:
    """Whether the run is to end."""
    return self.in_a_row >= self._most

  def take_count(self) -> int:
    """The number of skipped updates since the last call."""
    count, self._unreported = self._unreported, 0
    return count

  def diverged(self, what: str, saved_step: int | None) -> Diverged:
    """The error that ends the run; it names the newest checkpoint after which an update was good.

    Args:
      what: what ends the run.
      saved_step: the step of the newest checkpoint, None if there is none.
    """
    good = "there is no checkpoint" if saved_step is None else f"the newest checkpoint is of step {saved_step}"
    if saved_step is not None and saved_step == self.first_step - 1:
      good += (
        ", whose next update was the first of them: if it fails again, remove that checkpoint to resume from before"
      )
    return Diverged(
      f"{what}, because loss, gradient or result were not finite or the loss was too large; {good}. Lower "
      "optimizer.learning_rate or optimizer.clip_norm, or raise training.max_skips_in_a_row, and run the same command again."
    )
