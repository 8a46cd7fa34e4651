"""How rows should be trained after growth: recipes that all branch off one run at its seam.

    python -m experiments.growth_recipes --workdir=runs/growth_recipes                              # live growth
    python -m experiments.growth_recipes --workdir=runs/growth_recipes --recipes=tau --decay=400    # the rules for τ
    python -m experiments.growth_recipes --workdir=runs/growth_recipes --recipes=search --decay=400 --seeds=1

The run is that of growth_seam.py. The small model is trained once for each seed, and every recipe continues from its
state on the same batches, so that differences between recipes are their own. `--decay` says over how many of the last
steps the learning rate decays: 1000 begins at the seam, 400 leaves 600 steps at the full rate. Released growth restarts
a warm-up and a cosine with a fresh optimizer, as its authors do.

Two CPU cores busy with other work, November 2026, Python 3.11.7, jax 0.10.2, float32; `--decay=1000`, mean of 3 seeds, per
cent over the run without growth at the same step. The last column has the end by seed. "Over 100" means that the new
rows rise over 100 updates; old rows have half the rate. The other recipes of `LIVE` are one seed so far: over 500 ends
at −1.03 (2 ×) and −2.51 (4 ×) and is never above +0.01.

| factor | recipe | +0 | +50 | +100 | +200 | +300 | +400 | +600 | +800 | +1000 | largest | end by seed |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| 2 | released, restarted | +24.79 | +3.32 | +3.01 | +2.03 | +1.33 | +0.81 | -0.99 | -2.05 | -1.52 | +24.79 | -1.45, -1.57, -1.54 |
| 2 | live over 100 | +0.00 | -1.43 | -0.96 | -1.64 | -1.87 | -1.81 | -1.99 | -1.81 | -1.60 | +0.00 | -1.74, -1.64, -1.42 |
| 2 | live over 300 | +0.00 | -2.04 | -1.54 | -1.39 | -1.44 | -1.50 | -1.60 | -1.43 | -1.23 | +0.00 | -1.36, -1.30, -1.03 |
| 4 | released, restarted | +81.51 | +12.25 | +8.91 | +5.51 | +3.08 | +1.74 | -1.01 | -3.13 | -2.84 | +81.51 | -2.83, -2.70, -2.99 |
| 4 | live over 100 | +0.00 | +0.71 | +1.18 | -0.49 | -1.30 | -1.70 | -2.75 | -3.18 | -3.50 | +1.18 | -3.68, -3.58, -3.23 |
| 4 | live over 300 | +0.00 | -1.55 | +0.06 | -0.15 | -0.34 | -1.04 | -2.00 | -2.53 | -2.91 | +0.13 | -3.03, -3.07, -2.65 |

New rows that rise over 100 updates at 2 × and over 300 at 4 ×, in proportion to how many they are for each old one, are
above the run without growth by at most 0.13 % and end below released growth at both factors.

The table of the rules for τ is in docs/growth.md. The first search, one seed, 4 ×, at commit 7005107: per cent over the
loss without growth, at the worst evaluation and at the end (docs/growth_tradeoff.png). The steps to a new τ and the size
of new values change both; the rate of the old rows changes only the first.

| recipe | worst | end |
|---|---|---|
| τ moved over 300 steps, values × 1 | +6.37 | −3.38 |
| the same, new rows at a quarter of the rate, rising over 300 steps | +2.44 | −0.78 |
| τ kept, values × 1, new rows at a quarter of the rate | +2.20 | −0.55 |
| τ kept, values × 0.1 | +0.77 | −0.38 |
| τ moved over 300 steps, values × 0.3 | +2.05 | −2.04 |
| τ moved over 300 steps, values × 0.1 | +1.54 | −1.58 |
| τ moved over 700 steps, values × 0.1 | +0.93 | −1.33 |
| the same, new rows at half the rate | +0.45 | −1.05 |
| the same, new rows rising over 300 steps | +0.72 | −1.27 |
| the same, old rows at half the rate | 0.00 | −1.38 |
| the same, old rows at a quarter of the rate | 0.00 | −0.99 |
| τ moved over 700 steps, values × 0.3, old rows at half the rate | 0.00 | −1.79 |
| τ moved over 300 steps, values × 0.3, old rows at half the rate | 0.00 | −2.33 |
"""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tqdm
from absl import flags

from experiments.growth_seam import FACTORS, SEAM, SEEDS, STEPS, small_run
from tokenformer_jax import data
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, GrowthConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import logical_axes
from tokenformer_jax.training.program import Program, make_program
from tokenformer_jax.training.state import TrainState, fresh_state

EVALUATED = [SEAM + k for k in (20, 50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900, 1000)]
TAU_RULES = {f"τ {rule}": GrowthConfig(tau=rule) for rule in ("kept", "moved", "learned", "recomputed")}
PLAIN = dict(value_scale=1.0, old_rows_rate=1.0)
SEARCH = {
  "τ moved over 300 steps, values × 1": GrowthConfig(**PLAIN, tau_steps=300),
  "… new rows at a quarter of the rate, rising over 300 steps": GrowthConfig(
    **PLAIN, tau_steps=300, new_rows_rate=0.25, warmup_steps=300
  ),
  "τ kept, values × 1, new rows at a quarter of the rate": GrowthConfig(**PLAIN, tau="kept", new_rows_rate=0.25),
  "τ kept, values × 0.1": GrowthConfig(tau="kept", value_scale=0.1, old_rows_rate=1.0),
  "τ moved over 300 steps, values × 0.3": GrowthConfig(tau_steps=300, old_rows_rate=1.0),
  "τ moved over 300 steps, values × 0.1": GrowthConfig(tau_steps=300, value_scale=0.1, old_rows_rate=1.0),
  "τ moved over 700 steps, values × 0.1": GrowthConfig(tau_steps=700, value_scale=0.1, old_rows_rate=1.0),
  "… new rows at half the rate": GrowthConfig(tau_steps=700, value_scale=0.1, old_rows_rate=1.0, new_rows_rate=0.5),
  "… new rows rising over 300 steps": GrowthConfig(tau_steps=700, value_scale=0.1, old_rows_rate=1.0, warmup_steps=300),
  "… old rows at half the rate": GrowthConfig(tau_steps=700, value_scale=0.1),
  "… old rows at a quarter of the rate": GrowthConfig(tau_steps=700, value_scale=0.1, old_rows_rate=0.25),
  "τ moved over 700 steps, values × 0.3, old rows at half the rate": GrowthConfig(tau_steps=700),
  "τ moved over 300 steps, values × 0.3, old rows at half the rate": GrowthConfig(tau_steps=300),
}
RELEASED = "released, restarted"


def live(warmup: int, new: float = 1.0, old: float = 0.5) -> GrowthConfig:
  """Live keys; the new rows rise over `warmup` updates, and both kinds of rows have a factor on the rate."""
  return GrowthConfig(method="live", tau="kept", warmup_steps=warmup, new_rows_rate=new, old_rows_rate=old)


LIVE: dict[str, GrowthConfig | None] = {
  RELEASED: None,
  "exact": GrowthConfig(method="exact"),
  "live over 100": live(100),
  "live over 300": live(300),
  "live over 500": live(500),
  "live over 300, old rows at a quarter": live(300, old=0.25),
  "live over 300, new rows at 0.6": live(300, new=0.6),
}
RECIPES = {"live": LIVE, "tau": TAU_RULES, "search": SEARCH}


class Seam:
  """A small model at its seam, and what every branch reads from there on."""

  def __init__(self, seed: int, folder: pathlib.Path, config: Config):
    self.config = config
    corpus = data.open_data(self.config.data, seq_length=self.config.model.seq_length)
    self.held_out = list(corpus.held_out_batches(self.config.training.eval_batches))
    self.batches = list(itertools.islice(corpus.train_batches(), STEPS))
    self.folder = folder
    self.seed = seed
    self._state = None

  @property
  def state(self) -> TrainState:
    if self._state is None:
      program = make_program(self.config, self.config.model, make_mesh())
      self._state, _ = self._train(program, program.initial_state(), 0, SEAM, f"seed {self.seed}")
    return self._state

  def branch(self, name: str, growth: GrowthConfig | None, factor: int = 1) -> dict[int, float]:
    """Held-out loss by step of the run that grows at the seam by `factor`; of the one that does not for factor 1."""
    stored = self.folder / f"{name.replace('/', ':')} {factor}.json"
    if not stored.exists():
      model = self.config.model
      counts = {field: factor * getattr(model, field) for field in ("qkv_tokens", "proj_tokens", "ffn_tokens")}
      target = model.grown(**counts)
      if name == RELEASED:
        program, state = self._released(target)
      else:
        config = self.config if growth is None else dataclasses.replace(self.config, growth=growth)
        program = make_program(config, target, make_mesh())
        state = jax.tree.map(jnp.copy, self.state)
        if growth is not None:
          state, *_ = grow_state(state, model, target, growth, seed=config.training.seed)
        if growth is not None and growth.tau == "learned":
          state = dataclasses.replace(state, tau_opt_state=program.tau_rule.init(state.tau))
      losses = self._train(program, state, SEAM, STEPS, f"{name}, {factor} ×")[1]
      stored.parent.mkdir(parents=True, exist_ok=True)
      stored.write_text(json.dumps(losses))
    return {int(step): loss for step, loss in json.loads(stored.read_text()).items()}

  def _released(self, target) -> tuple[Program, TrainState]:
    config = dataclasses.replace(
      self.config,
      model=target,
      optimizer=dataclasses.replace(self.config.optimizer, schedule="warmup_cosine", decay_steps=0),
      training=dataclasses.replace(self.config.training, num_steps=STEPS - SEAM),
    )
    program = make_program(config, target, make_mesh())
    state = jax.tree.map(jnp.copy, self.state)
    grown, *_ = grow_state(state, self.config.model, target, GrowthConfig(method="released"), seed=config.training.seed)
    axes, _ = logical_axes(abstract_model(target))
    return program, fresh_state(grown.params, grown.tau, axes, program.optimizer, program.tau_rule)

  def _train(
    self, program: Program, state: TrainState, start: int, stop: int, name: str
  ) -> tuple[TrainState, dict[int, float]]:
    losses = {start: self._loss(program, state)} if start == SEAM else {}
    for step in tqdm.trange(start, stop, desc=name, unit="step", mininterval=10):
      state, _ = program.train_step(state, self.batches[step])
      if step + 1 > SEAM and step + 1 in EVALUATED:
        losses[step + 1] = self._loss(program, state)
    return state, losses

  def _loss(self, program: Program, state: TrainState) -> float:
    sums = [jax.device_get(program.eval_step(state.params, state.tau, batch)) for batch in self.held_out]
    return sum(float(s.nats) for s in sums) / sum(float(s.weight) for s in sums)


def main(argv):
  del argv
  folder = pathlib.Path(flags.FLAGS.workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  folder.mkdir(parents=True, exist_ok=True)
  curves: dict[tuple[int, str], list[dict[int, float]]] = {}
  recipes = RECIPES[flags.FLAGS.recipes]
  decay = flags.FLAGS.decay
  for seed in SEEDS[: flags.FLAGS.seeds]:
    config = small_run(seed)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=decay))
    seam = Seam(seed, folder / f"decay_{decay}" / f"seed_{seed}", config)
    runs = {(1, "no growth"): seam.branch("no growth", None)}
    for factor, name in itertools.product(FACTORS, recipes):
      runs[factor, name] = seam.branch(name, recipes[name], factor)
    for key, losses in runs.items():
      curves.setdefault(key, []).append(losses)
  report(curves, folder / f"growth_tradeoff_{decay}.png")


def report(curves, path: pathlib.Path) -> None:
  """Prints the table of the means over seeds and draws the trade-off."""
  shown = [SEAM + k for k in (0, 50, 100, 200, 400, 600, 800, 1000)]
  print(
    "\nHeld-out loss over that without growth at the same step, per cent; of the means of the seeds:\n\n"
    "| factor | recipe | " + " | ".join(f"+{step - SEAM}" for step in shown) + " | largest |\n"
    + "|---" * (len(shown) + 3) + "|"
  )  # fmt: skip
  mean = {
    key: {step: np.mean([losses[step] for losses in runs]) for step in [SEAM, *EVALUATED]}
    for key, runs in curves.items()
  }
  for (factor, name), losses in mean.items():
    over = {step: 100 * (loss / mean[1, "no growth"][step] - 1) for step, loss in losses.items()}
    print(
      f"| {factor} | {name} | " + " | ".join(f"{over[step]:+.2f}" for step in shown) + f" | {max(over.values()):+.2f} |"
    )
  plot({f"{factor} ×, {name}": losses for (factor, name), losses in mean.items() if factor != 1}, mean, path)


def plot(curves: dict[str, dict[int, float]], mean, path: pathlib.Path) -> None:
  """Each recipe's loss at the end against that at its worst evaluation, per cent over the run without growth."""
  control = mean[1, "no growth"]
  figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
  axes = figure.subplots()
  for number, (name, losses) in enumerate(curves.items()):
    over = {step: 100 * (loss / control[step] - 1) for step, loss in losses.items()}
    point = (max(over.values()), over[STEPS])
    axes.plot(*point, "o", color=f"C{number % 10}", label=f"{number + 1}: {name}")
    axes.annotate(f" {number + 1}", point)
  axes.axvline(0.5, color="grey", linestyle="--")
  axes.set_xlabel("worst evaluation, % over no growth")
  axes.set_ylabel(f"after {STEPS - SEAM} steps, % over no growth")
  figure.legend(loc="outside right", fontsize="small")
  figure.savefig(path, dpi=120)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/growth_recipes", "Folder of the results; run again to resume.")
  flags.DEFINE_integer("decay", 1000, "Steps of the decay at the end: 1000 begins at the seam, 400 later.")
  flags.DEFINE_integer("seeds", len(SEEDS), "How many seeds.", lower_bound=1, upper_bound=len(SEEDS))
  flags.DEFINE_enum("recipes", "live", list(RECIPES), "Live growth, the rules for τ, or the first search.")
  command.run(main)
