"""How rows should go on after exact growth: recipes that all branch off one run at its seam.

    python -m experiments.growth_recipes --workdir=runs/growth_recipes             # τ's rules, two factors, three seeds
    python -m experiments.growth_recipes --workdir=runs/growth_recipes --search    # the search before, one seed, 4 ×

The run is that of growth_seam.py. The small model is trained once for each seed and every recipe goes on from its
state, on the same batches, so differences between recipes are theirs.

Two CPU cores, November 2026, Python 3.11.7, jax 0.10.2, float32; about 25 minutes of CPU time for either. The table of
τ's rules is in docs/growth.md. The search, one seed, 4 ×: per cent over the loss without growth, at the worst evaluation
and at the end (docs/growth_tradeoff.png). The steps to a new τ and the size of new values set both; the old rows' rate moves the first alone.

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

from experiments.growth_seam import DECAY, FACTORS, SEAM, SEEDS, STEPS, small_run
from tokenformer_jax import data
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, GrowthConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.training.program import Program, make_program
from tokenformer_jax.training.state import TrainState

EVALUATED = [SEAM + k for k in (20, 50, 100, 150, 200, 250, 300, 400, 500)] + [
  STEPS - DECAY + DECAY * quarter // 4 for quarter in range(5)
]

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


class Seam:
  """A small model at its seam, and what every branch reads from there on."""

  def __init__(self, seed: int, folder: pathlib.Path):
    self.config = small_run(seed)
    corpus = data.open_data(self.config.data, seq_length=self.config.model.seq_length)
    self.held_out = list(corpus.held_out_batches(self.config.training.eval_batches))
    self.batches = list(itertools.islice(corpus.train_batches(), STEPS))
    self.folder = folder
    program = make_program(self.config, self.config.model, make_mesh())
    self.state, _ = self._train(program, program.initial_state(), 0, SEAM, f"seed {seed}")

  def branch(self, name: str, growth: GrowthConfig | None, factor: int = 1) -> dict[int, float]:
    """Held-out loss by step of the run that grows at the seam; without `growth` of the one that does not."""
    stored = self.folder / f"{name.replace('/', ' ')} {factor}.json"
    if not stored.exists():
      model = self.config.model
      config = self.config if growth is None else dataclasses.replace(self.config, growth=growth)
      state = jax.tree.map(jnp.copy, self.state)
      if growth is not None:
        model = model.grown(
          **{field: factor * getattr(model, field) for field in ("qkv_tokens", "proj_tokens", "ffn_tokens")}
        )
        state, *_ = grow_state(state, self.config.model, model, growth, seed=config.training.seed)
      program = make_program(config, model, make_mesh())
      if growth is not None and growth.tau == "learned":
        state = dataclasses.replace(state, tau_opt_state=program.tau_rule.init(state.tau))
      stored.parent.mkdir(parents=True, exist_ok=True)
      stored.write_text(json.dumps(self._train(program, state, SEAM, STEPS, f"{name}, {factor} ×")[1]))
    return {int(step): loss for step, loss in json.loads(stored.read_text()).items()}

  def _train(
    self, program: Program, state: TrainState, start: int, stop: int, name: str
  ) -> tuple[TrainState, dict[int, float]]:
    losses = {start: self._loss(program, state)} if start == SEAM else {}
    for step in tqdm.trange(start, stop, desc=name, unit="step"):
      state, _ = program.train_step(state, self.batches[step])
      if step + 1 > SEAM and step + 1 in EVALUATED:
        losses[step + 1] = self._loss(program, state)
    return state, losses

  def _loss(self, program: Program, state: TrainState) -> float:
    sums = [jax.device_get(program.eval_step(state.params, state.tau, batch)) for batch in self.held_out]
    return sum(float(s.nats) for s in sums) / sum(float(s.weight) for s in sums)


def slower(config: Config) -> Config:
  """The run without growth at half the rate, for the old rows' lower rate alone also lowers the loss for a while."""
  rate = config.optimizer.learning_rate / 2
  return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))


def main(argv):
  del argv
  search = flags.FLAGS.search
  folder = pathlib.Path(flags.FLAGS.workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  folder.mkdir(parents=True, exist_ok=True)
  recipes, seeds, factors = (SEARCH, SEEDS[:1], FACTORS[1:]) if search else (TAU_RULES, SEEDS, FACTORS)
  curves = {}
  for seed in seeds:
    seam = Seam(seed, folder / f"seed_{seed}")
    runs = {(1, "no growth"): seam.branch("no growth", None)}
    for factor, name in itertools.product(factors, recipes):
      runs[factor, name] = seam.branch(name, recipes[name], factor)
    seam.config = slower(seam.config)
    runs[1, "no growth, half the rate"] = seam.branch("no growth, half the rate", None)
    for key, losses in runs.items():
      curves.setdefault(key, []).append(losses)

  shown = [SEAM + k for k in (0, 50, 100, 200, 400, 600, 800, 1000)]
  print(
    "\nHeld-out loss over that without growth at the same step, per cent; of the means of the seeds:\n\n| factor | recipe | "
    + " | ".join(f"+{step - SEAM}" for step in shown)
    + " | largest |\n"
    + "|---" * (len(shown) + 3)
    + "|"
  )
  mean = {
    key: {step: np.mean([losses[step] for losses in runs]) for step in [SEAM, *EVALUATED]}
    for key, runs in curves.items()
  }
  for (factor, name), losses in mean.items():
    over = {step: 100 * (loss / mean[1, "no growth"][step] - 1) for step, loss in losses.items()}
    print(
      f"| {factor} | {name} | " + " | ".join(f"{over[step]:+.2f}" for step in shown) + f" | {max(over.values()):+.2f} |"
    )
  plot(
    {name: losses for (factor, name), losses in mean.items() if factor != 1},
    mean[1, "no growth"],
    folder / "growth_tradeoff.png",
  )


def plot(curves: dict[str, dict[int, float]], control: dict[int, float], path: pathlib.Path) -> None:
  """Each recipe's loss at the end against that at its worst evaluation, per cent over `control`."""
  figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
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
  flags.DEFINE_string("workdir", "runs/growth_recipes", "Folder of the results; run again to go on with them.")
  flags.DEFINE_bool("search", False, "The search for the default instead of τ's rules.")
  command.run(main)
