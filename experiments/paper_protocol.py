"""The paper's growth chain at small scale: four sizes, grown from one another, and each size from scratch.

    export TOKENFORMER_DATA=FOLDER
    python -m experiments.paper_protocol --workdir=runs/paper_protocol
    python -m experiments.paper_protocol --workdir=runs/paper_protocol --report

FOLDER holds `english_novels/{train,valid}.txt.gz`, books separated by lines that are <|endoftext|>. The text is read as
bytes. A unit u is `--unit` updates. As in the paper (its table 6) the sizes have 1 : 2.9 : 6.1 : 10.6 times as many
parameters without the embedding, the smallest is trained for 60u, each growth is followed by 30u, and every size is also
trained from scratch for 300u. `--preset=gpu` has 200 tokens for each parameter of the largest size; `--preset=cpu` is
smaller and takes hours. The runs can be killed at any time, and the same command resumes them.

Every run has a constant rate after its warm-up, which falls linearly to 0 over the last two thirds of its last stage, so
the chain itself grows at the full rate and each size of it has a branch for the decay. Released growth restarts: random
rows, a fresh optimizer, a warm-up and a cosine to 0 in each stage, from the weights of the stage before.

`equal` is the largest size from scratch, and `longer` the smallest one, with the FLOPs of the whole chain.
"""

import dataclasses
import json
import os
import pathlib
import time

import jax
import matplotlib.figure
import numpy as np
from absl import flags

from experiments.seeds_at_once import CORES, Runs, Text, load, on_host, save, stop_compiling, with_schedule
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, GrowthConfig, ModelConfig, OptimizerConfig, TrainingConfig

_SAVE_EVERY = 120.0  # Seconds.
MARKER = "<|endoftext|>"
RATIOS = (1.0, 2.9, 6.1, 10.6)
FIRST, STAGE, SCRATCH = 60, 30, 300  # Units.
GROWTHS = {
  "live": GrowthConfig(),
  "full": GrowthConfig(old_rows_rate=1.0),
  "exact": GrowthConfig(method="exact"),
}
# Tokens in each of q, k, v and proj at the smallest size, rows in a batch, updates in a unit, batches in an evaluation.
PRESETS = {"gpu": (32, 128, 30, 40), "cpu": (18, 32, 68, 40)}


@dataclasses.dataclass(frozen=True)
class Leg:
  """A piece of a run at one size and under one schedule.

  Attributes:
    name: of the leg.
    size: 0 to 3.
    after: the leg whose last state it continues.
    start, stop: in units of the run's text.
    schedule: `constant`; `decay`, the last two thirds of a stage; or `cosine`, a restart with a fresh optimizer.
    growth: how its chain grows.
    length: of the run or stage that it belongs to, in units: from the first update of a run from scratch, from the
      last growth of a chain.
  """

  name: str
  size: int
  after: str | None
  start: int
  stop: int
  schedule: str
  growth: str
  length: int


def decay(length: int) -> int:
  return 2 * length // 3


def stage_of(size: int) -> tuple[int, int]:
  """First and last unit of a chain's stage."""
  start = FIRST + STAGE * (size - 1) if size else 0
  return start, start + (STAGE if size else FIRST)


def trunk(growth: str, size: int) -> list[Leg]:
  """A chain's stage at the full rate, in two legs: a branch may leave it where the decay begins."""
  start, stop = stage_of(size)
  fork = stop - decay(stop - start)
  before = f"{growth} trunk {size - 1}" if size else None
  first = Leg(f"{growth} fork {size}", size, before, start, fork, "constant", growth, stop - start)
  return [first, Leg(f"{growth} trunk {size}", size, first.name, fork, stop, "constant", growth, stop - start)]


def branch(growth: str, size: int) -> Leg:
  start, stop = stage_of(size)
  fork = stop - decay(stop - start)
  return Leg(f"{growth} {size}", size, f"{growth} fork {size}", fork, stop, "decay", growth, stop - start)


def longer_stage(growth: str, length: int) -> list[Leg]:
  """The largest size's stage with another length."""
  start = stage_of(3)[0]
  fork = start + length - decay(length)
  return [
    Leg(f"{growth} fork 3 of {length}", 3, f"{growth} trunk 2", start, fork, "constant", growth, length),
    Leg(f"{growth} 3 of {length}", 3, f"{growth} fork 3 of {length}", fork, start + length, "decay", growth, length),
  ]


def chain(growth: str) -> list[Leg]:
  """What the largest size needs, and then the other sizes."""
  return [leg for size in (0, 1, 2) for leg in trunk(growth, size)] + trunk(growth, 3)[:1] + [branch(growth, 3)]


def released(size: int, length: int | None = None) -> Leg:
  start, stop = stage_of(size)
  name = f"released {size}" + (f" of {length}" if length else "")
  stop = start + length if length else stop
  before = f"released {size - 1}" if size else None
  return Leg(name, size, before, start, stop, "cosine", "released", stop - start)


def alone(name: str, size: int, length: int) -> list[Leg]:
  """A run from scratch."""
  fork = length - decay(length)
  return [
    Leg(f"{name} fork", size, None, 0, fork, "constant", "live", length),
    Leg(name, size, f"{name} fork", fork, length, "decay", "live", length),
  ]


def plan(unit_flops: list[float]) -> list[Leg]:
  """All legs, the most important ones first."""
  total = FIRST * unit_flops[0] + STAGE * sum(unit_flops[1:])
  equal, longer = (round(total / unit_flops[size]) for size in (3, 0))
  return [
    *chain("live"),
    *alone("scratch 3", 3, SCRATCH),
    *[released(size) for size in range(4)],
    *alone("equal", 3, equal),
    *alone("longer", 0, longer),
    *[branch("live", size) for size in (0, 1, 2)],
    *longer_stage("live", 60),
    *longer_stage("live", 15),
    released(3, 60),
    *alone("scratch 2", 2, SCRATCH),
    *alone("scratch 1", 1, SCRATCH),
    *alone("scratch 0", 0, SCRATCH),
    released(3, 15),
    *chain("full"),
    *chain("exact"),
  ]


class Protocol:
  """The plan's legs with their configurations, and what is stored of them."""

  def __init__(self, folder: pathlib.Path, smallest: int, rows: int, unit: int, eval_batches: int, rate: float):
    path = os.environ.get("TOKENFORMER_DATA")
    if not path:
      command.fail("TOKENFORMER_DATA is not set: name the folder that holds english_novels.")
    self.folder, self.unit = folder, unit
    self.counts = [max(round(ratio * smallest), 1) for ratio in RATIOS]
    self.config = Config(
      model=self._model(0),
      data=DataConfig(
        source=f"text:{path}/english_novels/train.txt.gz#{MARKER}",
        held_out_source=f"text:{path}/english_novels/valid.txt.gz#{MARKER}",
        batch_size=rows,
      ),
      optimizer=OptimizerConfig(learning_rate=rate, min_learning_rate=0.0, warmup_steps=2 * unit),
      training=TrainingConfig(num_steps=SCRATCH * unit, eval_batches=eval_batches, sample_tokens=0),
    )
    self.models = [self._model(size) for size in range(4)]
    tokens = unit * rows * self.config.model.seq_length
    self.unit_flops = [3.0 * tokens * model.forward_flops_per_token for model in self.models]
    self.legs = plan(self.unit_flops)

  def _model(self, size: int) -> ModelConfig:
    n = self.counts[size]
    return ModelConfig(
      vocab_size=384, num_layers=2, hidden_size=64, num_heads=4, seq_length=128,
      qkv_tokens=n, proj_tokens=n, ffn_tokens=4 * n,
    )  # fmt: skip

  def config_of(self, leg: Leg) -> Config:
    u = self.unit
    if leg.schedule == "cosine":
      config = with_schedule(self.config, leg.length * u, 0, schedule="warmup_cosine")
      return dataclasses.replace(config, growth=GrowthConfig(method="released"))
    steps = decay(leg.length) * u if leg.schedule == "decay" else 0
    config = with_schedule(self.config, (leg.stop if steps else 10**4) * u, steps)
    return dataclasses.replace(config, growth=GROWTHS[leg.growth])

  def losses(self, leg: Leg, seeds: tuple[int, ...]) -> dict[int, dict[int, float]]:
    """{seed: {unit: held-out loss}}, as far as it has been stored."""
    paths = {seed: self._results(leg, seed) for seed in seeds}
    stored = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
    return {seed: {int(unit): loss for unit, loss in losses.items()} for seed, losses in stored.items()}

  def _results(self, leg: Leg, seed: int) -> pathlib.Path:
    return self.folder / f"seed_{seed}" / f"{leg.name}.json"

  def train(self, seeds: tuple[int, ...], states: pathlib.Path, deadline: float) -> None:
    """Trains what is not done, until the time `deadline`. The states at the ends of legs are written to `states`."""
    missing = [leg for leg in self.legs if len(self.losses(leg, seeds)) < len(seeds)]
    ends = {leg.after for leg in self.legs}
    text = Text(self.config.data, self.config.model.seq_length, self.config.training.eval_batches)
    runs: dict[tuple[Config, ModelConfig], Runs] = {}
    saved = time.monotonic()
    for number, leg in enumerate(missing):
      for coming in missing[number : number + CORES]:
        if self._key(coming) not in runs:
          run = runs[self._key(coming)] = Runs(*self._key(coming), text, seeds, self.unit)
          before = self._before(coming)
          if before in missing and before.size != coming.size:
            run.prepare_growth(runs[self._key(before)], run.config.growth)
      run = runs[self._key(leg)]
      unfinished = states / f"{leg.name}.unfinished"
      if unfinished.exists():
        unit, state, losses = load(unfinished)
      else:
        unit, state, losses = leg.start, self._first(leg, run, states), {}
        losses[unit] = run.losses(state)
      began, first = time.monotonic(), unit
      while unit < leg.stop:
        state = run.updated(state, unit * self.unit)
        unit += 1
        if unit == leg.stop or unit % 10 == 0:
          losses[unit] = run.losses(state)
        jax.block_until_ready(state)
        now = time.monotonic()
        if now > deadline or now - saved > _SAVE_EVERY:
          save(unfinished, (unit, on_host(state), losses))
          saved = now
        if now > deadline:
          print(f"{leg.name}: stopped at {unit} of {leg.stop}u", flush=True)
          return
      if leg.name in ends:
        save(states / leg.name, on_host(state))
      for index, seed in enumerate(seeds):
        path = self._results(leg, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({unit: each[index] for unit, each in losses.items()}))
      unfinished.unlink(missing_ok=True)
      seconds = (time.monotonic() - began) / max(leg.stop - first, 1) / self.unit
      print(f"{leg.name}: {losses[leg.stop]}, {1e3 * seconds:.2f} ms a step", flush=True)

  def _first(self, leg: Leg, run: Runs, states: pathlib.Path):
    if leg.after is None:
      return run.initial_states()
    state = load(states / leg.after)
    before = self._before(leg)
    assert before is not None
    if before.size != leg.size:
      state = run.grown(state, self.models[before.size], self.config_of(leg).growth)
    return run.restarted(state) if leg.schedule == "cosine" else state

  def _key(self, leg: Leg) -> tuple[Config, ModelConfig]:
    return self.config_of(leg), self.models[leg.size]

  def _before(self, leg: Leg) -> Leg | None:
    return next((other for other in self.legs if other.name == leg.after), None)

  def path_flops(self, leg: Leg) -> float:
    """The FLOPs of everything that leads to the end of a leg."""
    before = self._before(leg)
    own = (leg.stop - leg.start) * self.unit_flops[leg.size]
    return own + (self.path_flops(before) if before else 0.0)


def report(protocol: Protocol, seeds: tuple[int, ...]) -> None:
  """Prints the last loss and the FLOPs of every run that is done, and draws loss over FLOPs."""
  whole = SCRATCH * protocol.unit_flops[3]
  print(
    "\n| run | parameters without the embedding | tokens seen | PFLOPs, all stages | of the largest from scratch "
    "| held-out loss (by seed) | perplexity a byte |\n" + "|---" * 7 + "|"
  )
  points = {}
  for leg in protocol.legs:
    losses = protocol.losses(leg, seeds)
    if not losses or leg.schedule == "constant":
      continue
    last = [each[leg.stop] for each in losses.values()]
    model, flops = protocol.models[leg.size], protocol.path_flops(leg)
    points[leg.name] = leg, flops, np.mean(last)
    own = model.num_parameters - model.vocab_size * model.hidden_size
    tokens = leg.stop * protocol.unit * protocol.config.data.batch_size * model.seq_length
    print(
      f"| {leg.name} | {own:,} | {tokens / 1e6:.1f}M | {flops / 1e15:.4f} | {flops / whole:.1%} "
      f"| {np.mean(last):.4f} ({', '.join(f'{loss:.4f}' for loss in last)}) | {np.exp(np.mean(last)):.4f} |"
    )
  if points:
    print(f"\n{plot(points, protocol.folder / 'paper_protocol.png')}")


def plot(points, path: pathlib.Path) -> pathlib.Path:
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  groups = {name: [p for leg, *p in points.values() if leg.name.startswith(name)] for name in (*GROWTHS, "released")}
  groups["from scratch"] = [p for leg, *p in points.values() if leg.name.split()[0] in ("scratch", "equal", "longer")]
  for number, (name, group) in enumerate(groups.items()):
    if group:
      axes.plot(*zip(*sorted(group)), "o" if name == "from scratch" else "o-", color=f"C{number}", label=name)
  axes.set_xscale("log")
  axes.set_xlabel("training FLOPs, all stages")
  axes.set_ylabel("held-out loss (nats a byte)")
  axes.legend()
  figure.savefig(path, dpi=120)
  return path


def main(argv):
  del argv
  given = flags.FLAGS
  smallest, rows, unit, batches = PRESETS[given.preset]
  folder = pathlib.Path(given.workdir).absolute()
  protocol = Protocol(folder, given.smallest or smallest, given.rows or rows, given.unit or unit, batches, given.rate)
  seeds = tuple(range(given.first_seed, given.first_seed + given.seeds))
  if not given.report:
    states = pathlib.Path(given.states or folder / "states") / f"seeds_{'_'.join(map(str, seeds))}"
    protocol.train(seeds, states, time.monotonic() + given.seconds)
    stop_compiling()
  report(protocol, seeds)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/paper_protocol", "Folder of the results; the same command resumes the runs.")
  flags.DEFINE_string("states", "", "Folder of the training states; by default inside workdir.")
  flags.DEFINE_enum("preset", "cpu", list(PRESETS), "Sizes of models, batches and the unit.")
  flags.DEFINE_integer("smallest", 0, "Tokens in each of q, k, v and proj of the smallest size; 0 for the preset's.")
  flags.DEFINE_integer("rows", 0, "Rows of 128 bytes in a batch; 0 for the preset's.")
  flags.DEFINE_integer("unit", 0, "Updates in a unit; 0 for the preset's.")
  flags.DEFINE_float("rate", 4e-3, "The largest learning rate.")
  flags.DEFINE_integer("seeds", 1, "How many seeds are trained at once.", lower_bound=1)
  flags.DEFINE_integer("first_seed", 0, "The first of them.")
  flags.DEFINE_float("seconds", 1e9, "Training stops after this time.")
  flags.DEFINE_boolean("report", False, "Only report what is done.")
  command.run(main)
