"""How rows should be trained after growth: recipes that all branch off one run at its seam.

    python -m experiments.growth_recipes --workdir=runs/growth_recipes
    python -m experiments.growth_recipes --workdir=runs/growth_recipes --settings=novels,large --decay=1000,400

A small model is trained once, all seeds at the same time (seeds_at_once.py), and every recipe continues from its states at
the seam on the same batches, so that differences between recipes are their own. `--settings` chooses the model and the
text: `code` is the run of growth_seam.py; `novels` the same on English novels, from the folder that TOKENFORMER_DATA names;
`large` a model of 1.1M parameters on the novels. `--decay` says over how many of the last steps the learning rate decays:
1000 begins at the seam, 400 leaves 600 steps at the full rate. Released growth restarts a warm-up and a cosine with a fresh
optimizer, as its authors do. `--recipes=live` has variants of the default, `--recipes=exact` the rules for τ.

Two CPU cores busy with other work, November 2026, Python 3.11.7, jax 0.10.2, float32; `--decay=1000`, mean of 3 seeds, per
cent over the run without growth at the same step, from commit 3c2a349. The last column has the end by seed. "Over 100"
means that the new rows rise over 100 updates; old rows have half the rate. With one seed, over 500 ends at −1.03 (2 ×) and
−2.51 (4 ×) and is never above +0.01.

| factor | recipe | +0 | +50 | +100 | +200 | +300 | +400 | +600 | +800 | +1000 | largest | end by seed |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| 2 | released, restarted | +24.79 | +3.32 | +3.01 | +2.03 | +1.33 | +0.81 | -0.99 | -2.05 | -1.52 | +24.79 | -1.45, -1.57, -1.54 |
| 2 | live over 100 | +0.00 | -1.43 | -0.96 | -1.64 | -1.87 | -1.81 | -1.99 | -1.81 | -1.60 | +0.00 | -1.74, -1.64, -1.42 |
| 2 | live over 300 | +0.00 | -2.04 | -1.54 | -1.39 | -1.44 | -1.50 | -1.60 | -1.43 | -1.23 | +0.00 | -1.36, -1.30, -1.03 |
| 4 | released, restarted | +81.51 | +12.25 | +8.91 | +5.51 | +3.08 | +1.74 | -1.01 | -3.13 | -2.84 | +81.51 | -2.83, -2.70, -2.99 |
| 4 | live over 100 | +0.00 | +0.71 | +1.18 | -0.49 | -1.30 | -1.70 | -2.75 | -3.18 | -3.50 | +1.18 | -3.68, -3.58, -3.23 |
| 4 | live over 300 | +0.00 | -1.55 | +0.06 | -0.15 | -0.34 | -1.04 | -2.00 | -2.53 | -2.91 | +0.13 | -3.03, -3.07, -2.65 |

New rows that rise over 100 updates at 2 × and over 300 at 4 ×, in proportion to how many they are for each old one, are
above the run without growth by at most 0.13 % and end below released growth at both factors. This is the default.

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
import os
import pathlib

import jax
import matplotlib.figure
import numpy as np
from absl import flags

from experiments.growth_seam import FACTORS, SEAM, SEEDS, STEPS, small_run
from experiments.seeds_at_once import CORES, Runs, Text, stop_compiling, with_schedule
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, GrowthConfig, ModelConfig

MARKER = "<|endoftext|>"
EVERY = 50  # Updates in one call, and between evaluations.
LARGE = ModelConfig(
  vocab_size=384, num_layers=4, hidden_size=128, num_heads=4, seq_length=64,
  qkv_tokens=128, proj_tokens=128, ffn_tokens=512,
)  # fmt: skip
RELEASED = "released, restarted"
DEFAULT: dict[str, GrowthConfig | None] = {"live (default)": GrowthConfig(), RELEASED: None}
LIVE: dict[str, GrowthConfig | None] = {
  **DEFAULT,
  "live, warm-up 300": GrowthConfig(warmup_steps=300),
  "live, warm-up 30": GrowthConfig(warmup_steps=30),
  "live, old rows at a quarter": GrowthConfig(old_rows_rate=0.25),
  "live, old rows at full rate": GrowthConfig(old_rows_rate=1.0),
  "live, new rows at 0.6": GrowthConfig(new_rows_rate=0.6),
}
EXACT = {
  f"exact, τ {rule}": GrowthConfig(method="exact", tau=rule) for rule in ("kept", "moved", "learned", "recomputed")
}
RECIPES = {"default": DEFAULT, "live": LIVE, "exact": EXACT}


def setting(name: str) -> Config:
  """The run without growth: on Python sources, on novels, or with a larger model on novels."""
  config = small_run(0)
  if name == "code":
    return config
  folder = os.environ.get("TOKENFORMER_DATA")
  if not folder:
    command.fail("TOKENFORMER_DATA is not set: name the folder that holds english_novels.")
  sources = {
    field: f"text:{folder}/english_novels/{part}.txt.gz#{MARKER}"
    for field, part in (("source", "train"), ("held_out_source", "valid"))
  }
  model = LARGE if name == "large" else config.model
  return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **sources))


class Branch:
  """A run from the seam on.

  Args:
    name: of the recipe.
    growth: None for released growth, and for no growth.
    factor: on the number of tokens; 1 for no growth.
    decay: number of the last updates over which the rate falls.
  """

  def __init__(self, name: str, growth: GrowthConfig | None, factor: int, decay: int, config: Config, folder):
    # Released growth restarts a cosine, whatever the decay of the other runs is.
    self.file = folder / ("" if name == RELEASED else f"decay_{decay}") / f"{name} {factor}.json"
    self.name, self.factor, self.growth = name, factor, growth
    counts = {field: factor * getattr(config.model, field) for field in ("qkv_tokens", "proj_tokens", "ffn_tokens")}
    self.model = config.model.grown(**counts)
    if name == RELEASED:
      config = with_schedule(config, STEPS - SEAM, 0, schedule="warmup_cosine")
      self.growth = GrowthConfig(method="released")
    else:
      config = with_schedule(config, STEPS, decay)
    self.config = dataclasses.replace(config, growth=self.growth or GrowthConfig())

  def losses(self) -> dict[int, list[float]]:
    """Held-out losses of the seeds by step, once they are stored."""
    return {int(step): losses for step, losses in json.loads(self.file.read_text()).items()}

  def train(self, run: Runs, states, small: ModelConfig) -> None:
    if self.growth is not None:
      states = run.grown(states, small, self.growth)
    if self.name == RELEASED:
      states = run.restarted(states)
    losses = {SEAM: run.losses(states)}
    for step in range(SEAM, STEPS, EVERY):
      states = run.updated(states, step)
      losses[step + EVERY] = run.losses(states)
    self.file.parent.mkdir(parents=True, exist_ok=True)
    self.file.write_text(json.dumps(losses))
    print(f"{self.file}: {losses[STEPS]}", flush=True)


def run_setting(config: Config, branches: list[Branch], seeds: tuple[int, ...]) -> None:
  """Trains the branches that are not stored; the small model is trained again if there are any."""
  missing = [branch for branch in branches if not branch.file.exists()]
  if not missing:
    return
  text = Text(config.data, config.model.seq_length, config.training.eval_batches)
  trunk = Runs(with_schedule(config, STEPS, 0), config.model, text, seeds, EVERY)
  runs: dict[int, Runs] = {}

  def compile_until(stop):
    for number in range(len(runs), min(stop, len(missing))):
      branch = missing[number]
      runs[number] = Runs(branch.config, branch.model, text, seeds, EVERY)
      if branch.growth is not None:
        runs[number].prepare_growth(trunk, branch.growth)

  compile_until(CORES)
  states = trunk.initial_states()
  for step in range(0, SEAM, EVERY):
    states = trunk.updated(states, step)
  states = jax.device_get(states)
  for number, branch in enumerate(missing):
    compile_until(number + CORES)
    branch.train(runs[number], states, config.model)


def main(argv):
  del argv
  given = flags.FLAGS
  seeds = SEEDS[: given.seeds]
  for name in given.settings:
    folder = pathlib.Path(given.workdir).absolute() / name / f"seeds_{len(seeds)}"
    config = setting(name)
    by_decay = {}
    for decay in map(int, given.decay):
      recipes = itertools.product(RECIPES[given.recipes].items(), FACTORS)
      branches = [Branch("no growth", None, 1, decay, config, folder)]
      branches += [Branch(recipe, growth, factor, decay, config, folder) for (recipe, growth), factor in recipes]
      by_decay[decay] = branches
    if not given.report:
      run_setting(config, list({b.file: b for branches in by_decay.values() for b in branches}.values()), seeds)
    for decay, branches in by_decay.items():
      print(f"\n{name}, {config.model.num_parameters:,} parameters, decay over {decay} steps, {len(seeds)} seeds.")
      report([branch for branch in branches if branch.file.exists()], folder / f"growth_tradeoff_{decay}.png")
  stop_compiling()


def report(branches: list[Branch], path: pathlib.Path) -> None:
  """Prints the table of the means over seeds and draws the trade-off."""
  if not branches or branches[0].factor != 1:
    print("The run without growth is not done.")
    return
  control = {step: np.asarray(losses) for step, losses in branches[0].losses().items()}
  shown = [SEAM + k for k in (0, 50, 100, 200, 300, 400, 600, 800, 1000) if SEAM + k in control]
  print(
    "Held-out loss over that without growth at the same step, per cent; of the means of the seeds:\n\n"
    "| factor | recipe | " + " | ".join(f"+{step - SEAM}" for step in shown) + " | largest | end by seed |\n"
    + "|---" * (len(shown) + 4) + "|"
  )  # fmt: skip
  points = {}
  for branch in branches:
    losses = branch.losses()
    over = {step: 100 * (np.mean(losses[step]) / control[step].mean() - 1) for step in losses}
    by_seed = 100 * (np.asarray(losses[STEPS]) / control[STEPS] - 1)
    print(
      f"| {branch.factor} | {branch.name} | " + " | ".join(f"{over[step]:+.2f}" for step in shown)
      + f" | {max(over.values()):+.2f} | {', '.join(f'{end:+.2f}' for end in by_seed)} |"
    )  # fmt: skip
    if branch.factor != 1:
      points[f"{branch.factor} ×, {branch.name}"] = max(over[step] for step in over if step > SEAM), over[STEPS]
  plot(points, path)


def plot(points: dict[str, tuple[float, float]], path: pathlib.Path) -> None:
  """Each recipe's loss at the end against that at its worst evaluation, per cent over the run without growth."""
  figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
  axes = figure.subplots()
  for number, (name, point) in enumerate(points.items()):
    axes.plot(*point, "o", color=f"C{number % 10}", label=f"{number + 1}: {name}")
    axes.annotate(f" {number + 1}", point)
  axes.axvline(0.5, color="grey", linestyle="--")
  axes.set_xlabel("worst evaluation, % over no growth")
  axes.set_ylabel(f"after {STEPS - SEAM} steps, % over no growth")
  figure.legend(loc="outside right", fontsize="small")
  figure.savefig(path, dpi=120)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/growth_recipes", "Folder of the results; run again to resume.")
  flags.DEFINE_list("settings", ["code"], "Which of code, novels and large, separated by commas.")
  flags.DEFINE_list("decay", ["1000"], "Steps of the decay at the end: 1000 begins at the seam, 400 later.")
  flags.DEFINE_integer("seeds", len(SEEDS), "How many seeds.", lower_bound=1, upper_bound=len(SEEDS))
  flags.DEFINE_enum("recipes", "default", list(RECIPES), "The default, variants of live growth, or τ of exact growth.")
  flags.DEFINE_boolean("report", False, "Only report what is done.")
  command.run(main)
