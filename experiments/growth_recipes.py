"""How rows should be trained after growth: recipes that all branch off one run at its seam.

    python -m experiments.growth_recipes --workdir=runs/growth_recipes
    python -m experiments.growth_recipes --workdir=runs/growth_recipes --settings=novels,large --decay=1000,400

A small model is trained once, all seeds at the same time (seeds_at_once.py), and every recipe continues from its states at
the seam on the same batches, so that differences between recipes are their own. `--settings` chooses the model and the
text: `code` is a model of 90,240 parameters on the interpreter's Python sources, `novels` the same on English novels, from
the folder that TOKENFORMER_DATA names, and `large` a model of 1.1M parameters on the novels. `--decay` says over how many of
the last steps the learning rate decays: 1000 begins at the seam, 400 leaves 600 steps at the full rate. Released growth
restarts a warm-up and a cosine with a fresh optimizer, as its authors do, whatever `--decay` is. `--recipes=live` has
variants of the default, `exact` the rules for τ (their table is in docs/growth.md), `controls` the run without growth at
half the rate and the big model from scratch.

Held-out loss over that of the run without growth at the same step, per cent, mean of 3 seeds (docs/growth_seam.png,
docs/growth_tradeoff.png). `novels` and `large`, the second command with `--workdir` alone changed: one NVIDIA H200, November
2026, Python 3.12.3, jax 0.11.2, float32 with XLA's default precision there (products in TF32), commit 733b6fd. `code`: two
CPU cores busy with other work, Python 3.11.7, jax 0.10.2, float32, commit 3c2a349.

| setting | decay | factor | recipe | +0 | +50 | +100 | +200 | +400 | +600 | +1000 | largest | end by seed |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| novels | 1000 | 2 | live (default) | +0.00 | -0.78 | -0.70 | -1.09 | -1.29 | -1.30 | -1.05 | +0.00 | -1.16, -0.96, -1.02 |
| novels | 1000 | 2 | released | +18.01 | +2.47 | +1.92 | +1.74 | +0.80 | -0.48 | -0.89 | +18.01 | -1.05, -0.71, -0.90 |
| novels | 1000 | 4 | live (default) | +0.00 | -0.76 | -0.32 | -0.03 | -0.71 | -1.23 | -2.00 | +0.02 | -2.10, -1.96, -1.93 |
| novels | 1000 | 4 | released | +54.10 | +7.89 | +6.05 | +3.79 | +1.44 | -0.68 | -1.98 | +54.10 | -2.43, -1.55, -1.96 |
| novels | 400 | 2 | live (default) | +0.00 | -0.86 | -0.86 | -1.30 | -1.90 | -2.10 | -1.47 | +0.00 | -1.51, -1.39, -1.49 |
| novels | 400 | 2 | released | +18.01 | +2.31 | +1.51 | +1.02 | -1.00 | -3.28 | -0.80 | +18.01 | -0.76, -0.74, -0.92 |
| novels | 400 | 4 | live (default) | +0.00 | -0.83 | -0.45 | -0.14 | -1.13 | -1.61 | -2.43 | +0.00 | -2.58, -2.21, -2.51 |
| novels | 400 | 4 | released | +54.10 | +7.72 | +5.62 | +3.05 | -0.36 | -3.48 | -1.89 | +54.10 | -2.13, -1.57, -1.98 |
| large | 1000 | 2 | live (default) | -0.00 | -1.06 | -0.94 | -1.05 | -1.00 | -0.90 | -0.32 | -0.00 | -0.37, -0.34, -0.25 |
| large | 1000 | 2 | released | +3.13 | +0.89 | +1.32 | +1.75 | +1.05 | +0.21 | +0.06 | +3.13 | +0.13, -0.06, +0.10 |
| large | 1000 | 4 | live (default) | +0.00 | -0.85 | +0.00 | +0.59 | +0.24 | +0.12 | -0.41 | +0.59 | -0.56, -0.35, -0.34 |
| large | 1000 | 4 | released | +11.46 | +4.61 | +4.20 | +4.05 | +2.69 | +1.13 | +0.46 | +11.46 | +0.47, +0.55, +0.35 |
| large | 400 | 2 | live (default) | -0.00 | -1.13 | -1.16 | -1.44 | -1.60 | -1.61 | -0.70 | -0.00 | -0.72, -0.74, -0.66 |
| large | 400 | 2 | released | +3.13 | +0.68 | +0.86 | +0.60 | -1.24 | -3.52 | -0.44 | +3.13 | -0.32, -0.54, -0.45 |
| large | 400 | 4 | live (default) | +0.00 | -0.90 | -0.11 | +0.23 | +0.55 | -0.27 | -0.48 | +0.55 | -0.47, -0.44, -0.52 |
| large | 400 | 4 | released | +11.46 | +4.39 | +3.72 | +2.87 | +0.36 | -2.63 | -0.04 | +11.46 | +0.01, +0.06, -0.20 |
| code | 1000 | 2 | live (default) | +0.00 | -1.43 | -0.96 | -1.64 | -1.81 | -1.99 | -1.60 | +0.00 | -1.74, -1.64, -1.42 |
| code | 1000 | 2 | released | +24.79 | +3.32 | +3.01 | +2.03 | +0.81 | -0.99 | -1.52 | +24.79 | -1.45, -1.57, -1.54 |
| code | 1000 | 4 | live (default) | +0.00 | -1.55 | +0.06 | -0.15 | -1.04 | -2.00 | -2.91 | +0.13 | -3.03, -3.07, -2.65 |
| code | 1000 | 4 | live, warm-up 33 | +0.00 | +0.71 | +1.18 | -0.49 | -1.70 | -2.75 | -3.50 | +1.18 | -3.68, -3.58, -3.23 |
| code | 1000 | 4 | released | +81.51 | +12.25 | +8.91 | +5.51 | +1.74 | -1.01 | -2.84 | +81.51 | -2.83, -2.70, -2.99 |

The default ends below released growth in all ten cases, by 0.02 to 0.87 points, and is above the run without growth by
at most 0.59 %. In three cases (novels with the early decay at 4 ×, code at both factors) the difference at the end is
within the noise of the seeds. Released growth is lower in the middle of the runs whose decay comes late, since its own
rate falls from the seam on.

The controls at commit 7005107, `code`, decay over 400 steps: half the rate without growth gains −2.84 % at +50 and ends
at +0.42 %; the big model from scratch, which takes 1.4 and 1.8 times the arithmetic of the grown one, ends at −3.57 %
(2 ×) and −7.58 % (4 ×). There 32 tokens in each projection are what limits the small model.

The first search among variants of exact growth, `code`, decay over 400 steps, one seed, 4 ×, at commit 7005107, at the
worst evaluation and at the end. The steps to a new τ and the size of new values change both; the rate of the old rows
changes only the first.

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
import json
import os
import pathlib

import jax
import matplotlib.figure
import numpy as np
from absl import flags

from experiments.seeds_at_once import CORES, Runs, Text, stop_compiling, with_schedule
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, GrowthConfig, ModelConfig, OptimizerConfig, TrainingConfig

MARKER = "<|endoftext|>"
SEAM, STEPS, EVERY = 2000, 3000, 50  # Updates: until growth, in all, and between evaluations.
SEEDS, FACTORS = (0, 1, 2), (2, 4)
SMALL = ModelConfig(
  vocab_size=384, num_layers=2, hidden_size=64, num_heads=4, seq_length=64,
  qkv_tokens=32, proj_tokens=32, ffn_tokens=128,
)  # fmt: skip
LARGE = ModelConfig(
  vocab_size=384, num_layers=4, hidden_size=128, num_heads=4, seq_length=64,
  qkv_tokens=128, proj_tokens=128, ffn_tokens=512,
)  # fmt: skip
RELEASED, HALF_RATE, SCRATCH = "released, restarted", "no growth, half the rate", "from scratch"
DEFAULT: dict[str, GrowthConfig | None] = {"live (default)": GrowthConfig(), RELEASED: None}
LIVE: dict[str, GrowthConfig | None] = {
  **DEFAULT,
  "live, warm-up 300": GrowthConfig(warmup_steps=300),
  "live, warm-up 33": GrowthConfig(warmup_steps=33),
  "live, old rows at a quarter": GrowthConfig(old_rows_rate=0.25),
  "live, old rows at full rate": GrowthConfig(old_rows_rate=1.0),
  "live, new rows at 0.6": GrowthConfig(new_rows_rate=0.6),
}
EXACT = {
  f"exact, τ {rule}": GrowthConfig(method="exact", tau=rule) for rule in ("kept", "moved", "learned", "recomputed")
}
CONTROLS: dict[str, GrowthConfig | None] = {HALF_RATE: None, SCRATCH: None}
RECIPES = {"default": DEFAULT, "live": LIVE, "exact": EXACT, "controls": CONTROLS}


def small_run(seed: int) -> Config:
  """The run without growth: 90,240 parameters, 64 bytes of Python a row."""
  return Config(
    model=SMALL,
    data=DataConfig(batch_size=16, seed=seed),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=400),
    training=TrainingConfig(
      num_steps=STEPS, seed=seed, log_every=EVERY, eval_every=EVERY, eval_batches=20,
      checkpoint_every=SEAM, checkpoints_kept=3, sample_tokens=0,
    ),
  )  # fmt: skip


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
    growth: None for released growth, and where nothing grows.
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
      rate = config.optimizer.learning_rate / (2 if name == HALF_RATE else 1)
      config = with_schedule(config, STEPS, decay, learning_rate=rate)
    self.config = dataclasses.replace(config, growth=self.growth or GrowthConfig())

  def losses(self) -> dict[int, list[float]]:
    """Held-out losses of the seeds by step, once they are stored."""
    return {int(step): losses for step, losses in json.loads(self.file.read_text()).items()}

  def train(self, run: Runs, states, small: ModelConfig) -> None:
    if self.growth is not None:
      states = run.grown(states, small, self.growth)
    if self.name == RELEASED:
      states = run.restarted(states)
    start = 0 if self.name == SCRATCH else SEAM
    if self.name == SCRATCH:
      states = run.initial_states()
    losses = {}
    for step in range(start, STEPS, EVERY):
      if step >= SEAM:
        losses[step] = run.losses(states)
      states = run.updated(states, step)
    losses[STEPS] = run.losses(states)
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
  workdir = pathlib.Path(given.workdir).absolute()
  curves = {}
  for name in given.settings:
    folder, config = workdir / name / f"seeds_{len(seeds)}", setting(name)
    by_decay = {}
    for decay in map(int, given.decay):
      branches = [Branch("no growth", None, 1, decay, config, folder)]
      for recipe, growth in RECIPES[given.recipes].items():
        factors = (1,) if recipe == HALF_RATE else FACTORS
        branches += [Branch(recipe, growth, factor, decay, config, folder) for factor in factors]
      by_decay[decay] = branches
    if not given.report:
      run_setting(config, list({b.file: b for branches in by_decay.values() for b in branches}.values()), seeds)
    for decay, branches in by_decay.items():
      print(f"\n{name}, {config.model.num_parameters:,} parameters, decay over {decay} steps, {len(seeds)} seeds.")
      curves[f"{name}, decay over {decay}"] = report([branch for branch in branches if branch.file.exists()])
  stop_compiling()
  plot_curves(curves, workdir / "growth_seam.png")
  plot_trade_off(curves, workdir / "growth_tradeoff.png")


def report(branches: list[Branch]) -> dict[str, dict[int, float]]:
  """Prints the table of the means over seeds.

  Returns:
    {"4 ×, recipe": {step: per cent over the run without growth}}
  """
  if not branches or branches[0].name != "no growth":
    print("The run without growth is not done.")
    return {}
  control = {step: np.asarray(losses) for step, losses in branches[0].losses().items()}
  shown = [SEAM + k for k in (0, 50, 100, 200, 300, 400, 600, 800, 1000)]
  print(
    "Held-out loss over that without growth at the same step, per cent; of the means of the seeds:\n\n"
    "| factor | recipe | " + " | ".join(f"+{step - SEAM}" for step in shown) + " | largest | end by seed |\n"
    + "|---" * (len(shown) + 4) + "|"
  )  # fmt: skip
  curves = {}
  for branch in branches:
    losses = branch.losses()
    over = {step: 100 * (np.mean(losses[step]) / control[step].mean() - 1) for step in losses}
    by_seed = 100 * (np.asarray(losses[STEPS]) / control[STEPS] - 1)
    print(
      f"| {branch.factor} | {branch.name} | " + " | ".join(f"{over[step]:+.2f}" for step in shown)
      + f" | {max(over.values()):+.2f} | {', '.join(f'{end:+.2f}' for end in by_seed)} |"
    )  # fmt: skip
    if branch is not branches[0]:
      curves[f"{branch.factor} ×, {branch.name}"] = over
  return curves


def plot_curves(curves: dict[str, dict[str, dict[int, float]]], path: pathlib.Path) -> None:
  """A panel for each setting: the loss from the seam on, per cent over the run without growth."""
  figure = matplotlib.figure.Figure(figsize=(5 * len(curves), 4), layout="constrained")
  panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
  for axes, (title, recipes) in zip(panels, curves.items()):
    for number, (name, over) in enumerate(recipes.items()):
      axes.plot([step - SEAM for step in over], list(over.values()), color=f"C{number}", label=name)
    axes.axhline(0, color="grey", linestyle="--")
    axes.set(title=title, xlabel="steps since growth", ylim=(-5, 8))
  panels[0].set_ylabel("held-out loss, % over no growth")
  panels[0].legend(fontsize="small")
  figure.savefig(path, dpi=70)
  print(f"\n{path}")


def plot_trade_off(curves: dict[str, dict[str, dict[int, float]]], path: pathlib.Path) -> None:
  """Each recipe's loss at the end against that at its worst evaluation, per cent over the run without growth."""
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  names = list(dict.fromkeys(name for recipes in curves.values() for name in recipes))
  for number, name in enumerate(names):
    found = [recipes[name] for recipes in curves.values() if name in recipes]
    worst = [max(loss for step, loss in over.items() if step > SEAM) for over in found]
    axes.plot(worst, [over[STEPS] for over in found], "o", color=f"C{number % 10}", label=name)
  axes.axvline(0.5, color="grey", linestyle="--")
  axes.set(xlabel="worst evaluation after the seam, % over no growth", ylabel=f"after {STEPS - SEAM} steps, %")
  axes.legend(fontsize="small")
  figure.savefig(path, dpi=70)
  print(path)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/growth_recipes", "Folder of the results; run again to resume.")
  flags.DEFINE_list("settings", ["code"], "Which of code, novels and large, separated by commas.")
  flags.DEFINE_list("decay", ["1000"], "Steps of the decay at the end: 1000 begins at the seam, 400 later.")
  flags.DEFINE_integer("seeds", len(SEEDS), "How many seeds.", lower_bound=1, upper_bound=len(SEEDS))
  flags.DEFINE_enum("recipes", "default", list(RECIPES), "The default, variants of it, τ of exact growth, or controls.")
  flags.DEFINE_boolean("report", False, "Only report what is done.")
  command.run(main)
