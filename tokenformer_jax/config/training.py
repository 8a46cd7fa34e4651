"""How a model is trained: optimizer, growth, mesh, length of the run."""

import dataclasses
from typing import ClassVar

from tokenformer_jax.config.model import TOKEN_COUNTS
from tokenformer_jax.config.validation import Checked, require, require_choice

MOMENT_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("warmup_stable_decay", "warmup_cosine", "budget_triangle")
GROWTH_METHODS = ("auto", "exact", "live", "released", "duplicate")
TAU_RULES = ("kept", "recomputed", "moved", "learned")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
  """The optimizer, its learning-rate schedule, global-norm clipping and the average of the weights.

  Attributes:
    schedule: `warmup_stable_decay` rises linearly, stays constant, and falls linearly to `min_learning_rate` over the
      last `decay_steps` updates. Use it for runs that grow, because it has neither a restart nor an early decay.
      `warmup_cosine` rises linearly and falls along a cosine from there to the last update.
      `budget_triangle` rises linearly from a quarter of the rate to all of it at three quarters of the run, and falls
      linearly to `min_learning_rate` (arXiv 2212.14034 falls to 0); it reads neither `warmup_steps` nor `decay_steps`.
      Of the first two, the first update has the rate learning_rate / warmup_steps, the update number `warmup_steps` has the
      full rate, and the last update of a run that decays has exactly `min_learning_rate`.
    learning_rate, min_learning_rate: the largest and the last rate.
    warmup_steps, decay_steps: lengths in updates; together at most `training.num_steps`. `warmup_cosine` does not read
      `decay_steps`.
    beta1, beta2: decay rates of the running means. `adamw` uses them for the mean of the gradients and the mean of
      their squares, `lion` for its update and its momentum (its paper takes 0.9 and 0.99), `muon` takes `beta1` for its
      momentum (usually 0.95) and both for the parameters that it leaves to Adam.
    eps: added to the denominators of `adamw` and `muon`.
    weight_decay: decoupled decay, times the learning rate. The final norm is not decayed.
    clip_norm: the largest global norm of the gradients; inf turns clipping off.
    z_loss: coefficient of the mean of log² Σ exp(logits) in the loss.
    first_moment_dtype, second_moment_dtype: types of the running means between updates; bfloat16 saves 2 bytes a
      parameter each. The second applies to `adamw` only.
    name: `adamw`, `lion` (arXiv 2302.06675), or `muon` (Newton-Schulz steps on the momentum of every matrix of
      the blocks, each layer by itself; embeddings, norms, biases and gains take Adam). Muon's updates are scaled to the size of
      AdamW's (arXiv 2502.16982), so the same rates fit; Lion wants a rate 3 to 10 times smaller and a decay as much
      larger.
    ema_decay: decay of an exponential moving average of the weights, which evaluations and samples then use; 0 keeps
      no average. The average of the first updates is shorter: the decay of update n is at most n / (n + 9).
    layer_decay: factor of each layer's rate over that of the layer behind it, for fine-tuning; 1 is one rate for all.
  """

  may_be_infinite: ClassVar[tuple[str, ...]] = ("clip_norm",)

  schedule: str = "warmup_stable_decay"
  learning_rate: float = 6e-4
  min_learning_rate: float = 6e-5
  warmup_steps: int = 100
  decay_steps: int = 0
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  z_loss: float = 0.0
  first_moment_dtype: str = "float32"
  second_moment_dtype: str = "float32"
  name: str = "adamw"
  ema_decay: float = 0.0
  layer_decay: float = 1.0

  def validate(self) -> None:
    require_choice("name", self.name, OPTIMIZERS)
    require_choice("schedule", self.schedule, SCHEDULES)
    for field in ("first_moment_dtype", "second_moment_dtype"):
      require_choice(field, getattr(self, field), MOMENT_DTYPES)
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive.")
    require(
      0 <= self.min_learning_rate <= self.learning_rate,
      "min_learning_rate",
      self.min_learning_rate,
      f"must be in [0, learning_rate={self.learning_rate}].",
    )
    for field in ("warmup_steps", "decay_steps", "weight_decay", "z_loss"):
      require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative.")
    for field in ("beta1", "beta2", "ema_decay"):
      require(0 <= getattr(self, field) < 1, field, getattr(self, field), "must be in [0, 1).")
    require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "must be in (0, 1]; 1 is one rate for all.")
    for field in ("eps", "clip_norm"):
      require(getattr(self, field) > 0, field, getattr(self, field), "must be positive.")
    require(
      self.second_moment_dtype == "float32" or self.name == "adamw",
      "second_moment_dtype",
      self.second_moment_dtype,
      f"applies to name='adamw' only; leave it at 'float32' for name={self.name!r}.",
    )
    require(
      self.second_moment_dtype == "float32" or self.beta2 <= 0.99,
      "beta2",
      self.beta2,
      "must be at most 0.99 with second_moment_dtype=bfloat16, which would round away what a step removes.",
    )
    require(
      self.name != "lion" or self.eps == OptimizerConfig.eps,
      "eps",
      self.eps,
      f"name='lion' divides by nothing; leave eps at its default {OptimizerConfig.eps}.",
    )


@dataclasses.dataclass(frozen=True)
class GrowthStage(Checked):
  """At `step` (after that many updates) the model gets these counts; 0 where it has no such rows."""

  step: int
  qkv_tokens: int
  proj_tokens: int
  ffn_tokens: int

  @property
  def tokens(self) -> dict[str, int]:
    return {count: getattr(self, count) for count in TOKEN_COUNTS}


@dataclasses.dataclass(frozen=True)
class GrowthConfig(Checked):
  """When the model grows, how new rows begin, and how new and old rows are trained then.

  The defaults are those of experiments/growth_recipes.py that neither disturb the model nor end above released growth.

  Attributes:
    stages: the growths of the run, by rising step.
    method: how new rows begin (`growth.grow`):

      - `auto`: `live` in each layer where it keeps the function for any keys, which are the layers of `l2_norm_gelu` with
        at least min(n, d) new rows for n old keys of d channels; `exact` in the others.
      - `exact`: keys zero, values random, τ unchanged; the function stays. Hidden units have random keys and zero values.
      - `live`: values zero, keys random with the second moments of the old ones, τ to fit; the function stays. An
        average of the weights (`ema_decay`) gets the new keys of the weights themselves, so its own function changes as
        far as its keys differ from theirs.
      - `released`: keys and values random, τ that of a new layer; the function changes, as in the released code.
      - `duplicate`: all rows repeated, each value divided unevenly among its copies, τ to fit; the function stays. The
        new count must be a multiple of the old one. Copies are as old as the rows that they were copied from, so
        `tau`, `warmup_steps` and the two rates do not act on this growth.

    tau: what happens to τ after `exact` growth: `kept`; `recomputed`, at once that of a new layer, which changes the
      function; `moved` to that over `tau_steps` steps, τ² linearly; `learned`, by Adam on log τ at the run's rate.
    tau_steps: length of the move, in updates.
    value_scale: size of the new values of `exact`, in units of a new layer's.
    warmup_steps: over how many updates the updates of new rows rise to full size where a growth doubles a layer; a
      growth that adds k rows for each old one takes k times as many.
    new_rows_rate: factor on the learning rate of the rows that the last growth of their layer added.
    old_rows_rate: factor on the learning rate of the layer's rows before them; 0 freezes them. A layer that has not
      grown keeps its rate.
  """

  renamed: ClassVar[dict[str, str]] = {"how": "method"}

  stages: tuple[GrowthStage, ...] = ()
  method: str = "auto"
  tau: str = "moved"
  tau_steps: int = 500
  value_scale: float = 0.3
  warmup_steps: int = 100
  new_rows_rate: float = 1.0
  old_rows_rate: float = 0.5

  def validate(self) -> None:
    require_choice("method", self.method, GROWTH_METHODS)
    require_choice("tau", self.tau, TAU_RULES)
    require(self.tau_steps >= 1, "tau_steps", self.tau_steps, "must be at least 1.")
    require(
      self.value_scale > 0,
      "value_scale",
      self.value_scale,
      "must be positive: new rows with zero keys and zero values would never learn.",
    )
    require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must not be negative.")
    require(self.new_rows_rate > 0, "new_rows_rate", self.new_rows_rate, "must be positive.")
    require(self.old_rows_rate >= 0, "old_rows_rate", self.old_rows_rate, "must not be negative.")
    steps = [stage.step for stage in self.stages]
    require(all(a < b for a, b in zip([0, *steps], steps)), "stages", steps, "the steps must be at least 1 and rise.")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
  """Number of devices along each mesh axis; −1 takes the devices that the other axes leave.

  Attributes:
    data: splits the batch.
    fsdp: splits the batch and the parameters' channels.
    token: splits parameter tokens, attention heads and the vocabulary.
    sequence: splits the positions of each sequence, for sequences that are too long for one device.
  """

  data: int = -1
  fsdp: int = 1
  token: int = 1
  sequence: int = 1

  def validate(self) -> None:
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      require(size >= 1 or size == -1, f"{axis}", size, "must be at least 1, or −1 for all remaining devices.")
    require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis may be −1.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Checked):
  """Length of the run, and how often it reports, evaluates and saves.

  Attributes:
    num_steps: length of the run, in updates.
    seed: of the initial parameters, of the rows that growth adds, and of samples.
    gradient_accumulation: number of micro-batches that a batch is computed in.
    log_every, eval_every, checkpoint_every: intervals in updates.
    eval_batches: batches of each held-out set in one evaluation.
    checkpoints_kept: how many of the newest checkpoints are kept.
    sample_prompt: the beginning of the text that the model continues at each evaluation; "" begins a document.
    sample_tokens: length of that continuation in tokens; 0 writes no samples. Writing one holds a second copy of the
      parameters, in the dtype of products, until it is written.
    wandb_project: the project of Weights & Biases to write metrics and samples to; "" writes none there.
    max_skips_in_a_row: updates whose loss, gradient or result is not finite are skipped; so many in a row end the run.
    spike_factor: updates whose loss is above this factor times the mean of the last 100 good losses are skipped too;
      0 skips none of them.
    step_timeout: seconds after which a step that has not ended ends the process with the stacks of its threads. The
      step that compiles, evaluations and saves are not timed. 0 waits for ever.
  """

  num_steps: int = 1000
  seed: int = 1234
  gradient_accumulation: int = 1
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 20
  checkpoint_every: int = 500
  checkpoints_kept: int = 2
  sample_prompt: str = "def "
  sample_tokens: int = 100
  wandb_project: str = ""
  max_skips_in_a_row: int = 10
  spike_factor: float = 0.0
  step_timeout: float = 1800.0

  def validate(self) -> None:
    for field in (
      "num_steps",
      "gradient_accumulation",
      "log_every",
      "eval_every",
      "eval_batches",
      "checkpoint_every",
      "checkpoints_kept",
      "max_skips_in_a_row",
    ):
      require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1.")
    require(
      self.spike_factor == 0 or self.spike_factor > 1,
      "spike_factor",
      self.spike_factor,
      "must be above 1, or 0 for none.",
    )
    require(
      0 <= self.step_timeout <= 1e6, "step_timeout", self.step_timeout, "must be in [0, 1e6] seconds; 0 waits for ever."
    )
    require(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, "must not be negative.")
    require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32): JAX's random keys take 32 bits of it.")
