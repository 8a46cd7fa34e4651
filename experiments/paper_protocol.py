"""The paper's growth chain at small scale: four sizes, grown from one another, and each size from scratch.

    export TOKENFORMER_DATA=FOLDER
    python -m experiments.paper_protocol --workdir=runs/paper_protocol --preset=gpu --seeds=2
    python -m experiments.paper_protocol --workdir=runs/paper_protocol --preset=gpu --seeds=2 --report

FOLDER holds `english_novels/{train,valid}.txt.gz`, books separated by lines that are <|endoftext|>. The text is read as
bytes. A unit u is `--unit` updates. As in the paper (its table 6) the sizes have 1 : 2.9 : 6.1 : 10.6 times as many
parameters without the embedding, the smallest is trained for 60u, each growth is followed by 30u, and every size is also
trained from scratch for 300u. Both presets have 200 tokens or more for each parameter of the largest size; `cpu` is smaller
and takes hours. The runs can be killed at any time, and the same command resumes them (paper_plan.py has their order).

Every run has a constant rate after its warm-up, which falls linearly to 0 over the last two thirds of its last stage, so
the chain itself grows at the full rate and each size of it has a branch for the decay. Released growth restarts: random
rows, a fresh optimizer, a warm-up and a cosine to 0 in each stage, from the weights of the stage before. `equal` is the
largest size from scratch, and `longer` the smallest one, with the FLOPs of the whole chain. `net2net` is a dense Transformer
of about the same parameters whose feed-forward is widened by copying hidden units (arXiv 1511.05641), so each size is a
multiple of the one before, and `net2net equal` its largest size from scratch with the FLOPs of that chain.

The first two runs and released growth's first stage, two seeds at once, until the time given to them was over: one NVIDIA
H200, three minutes beside growth_recipes.py, November 2026, Python 3.12.3, jax 0.11.2, float32 with XLA's default precision there (products in
TF32), commit 733b6fd (docs/paper_protocol.png). A `trunk` is the end of a stage at the full
rate. Parameters are without the embedding, PFLOPs those of all stages, the share is of the largest size from scratch, and
losses and perplexities are per byte:

| leg | rate | parameters | tokens seen | PFLOPs | share | held-out loss (by seed) | perplexity |
|---|---|---|---|---|---|---|---|
| live trunk 0 | constant | 65,536 | 29.5M | 0.0188 | 2.9% | 1.5702 (1.5793, 1.5611) | 4.8076 |
| live trunk 1 | constant | 190,464 | 44.2M | 0.0393 | 6.0% | 1.4751 (1.4811, 1.4691) | 4.3715 |
| live trunk 2 | constant | 399,360 | 59.0M | 0.0783 | 12.0% | 1.4269 (1.4274, 1.4264) | 4.1659 |
| live fork 3 | constant | 694,272 | 63.9M | 0.1000 | 15.4% | 1.4171 (1.4224, 1.4117) | 4.1250 |
| live 3 | decay | 694,272 | 73.7M | 0.1433 | 22.0% | 1.3422 (1.3436, 1.3409) | 3.8276 |
| scratch 3 fork | constant | 694,272 | 49.2M | 0.2168 | 33.3% | 1.3978 (1.3938, 1.4019) | 4.0463 |
| scratch 3 | decay | 694,272 | 147.5M | 0.6505 | 100.0% | 1.2792 (1.2765, 1.2818) | 3.5936 |
| released 0 | cosine | 65,536 | 29.5M | 0.0188 | 2.9% | 1.5543 (1.5604, 1.5481) | 4.7316 |

The chain ends 4.9 % above the run from scratch for 22 % of its FLOPs and does not reach its loss; the paper has 0.5 %. At
the full rate the chain has at 12.0 % and 15.4 % of the FLOPs the loss that the run from scratch has at 21 % and 24 %. The
text has 52M bytes, so the chain reads it 1.4 times and the run from scratch 2.8 times. The training states were not kept:
the first command begins again and goes on to the other runs. These are 4,500 updates of the chain and 9,000 from scratch
at 5 to 19 ms each.
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

from experiments.paper_plan import SCRATCH, SIZES, Leg, decay, plan
from experiments.seeds_at_once import CORES, Runs, Text, load, on_host, save, stop_compiling, with_schedule
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, GrowthConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.parts import AttentionConfig, FeedForwardConfig

_SAVE_EVERY = 120.0  # Seconds.
MARKER = "<|endoftext|>"
GROWTHS = {
  "live": GrowthConfig(),
  "released": GrowthConfig(method="released"),
  "net2net": GrowthConfig(method="duplicate"),
}
# Tokens in each of q, k, v and proj at the smallest size, rows in a batch, updates in a unit, batches in an evaluation.
PRESETS = {"gpu": (32, 128, 30, 40), "cpu": (18, 32, 68, 40)}


class Protocol:
  """The plan's legs with their configurations, and what is stored of them."""

  def __init__(self, folder: pathlib.Path, smallest: int, rows: int, unit: int, eval_batches: int, rate: float):
    path = os.environ.get("TOKENFORMER_DATA")
    if not path:
      command.fail("TOKENFORMER_DATA is not set: name the folder that holds english_novels.")
    self.folder, self.unit = folder, unit
    counts = [max(round(size * smallest), 1) for size in SIZES]
    self._models = [_token_model(count) for count in counts], [_dense_model(rows) for rows in _dense_rows(counts)]
    self.config = Config(
      model=self._models[0][0],
      data=DataConfig(
        source=f"text:{path}/english_novels/train.txt.gz#{MARKER}",
        held_out_source=f"text:{path}/english_novels/valid.txt.gz#{MARKER}",
        batch_size=rows,
      ),
      optimizer=OptimizerConfig(learning_rate=rate, min_learning_rate=0.0, warmup_steps=2 * unit),
      training=TrainingConfig(num_steps=SCRATCH * unit, eval_batches=eval_batches, sample_tokens=0),
    )
    tokens = unit * rows * self.config.model.seq_length
    self._unit_flops = [[3.0 * tokens * model.forward_flops_per_token for model in models] for models in self._models]
    self.legs = plan(*self._unit_flops)

  def model(self, leg: Leg) -> ModelConfig:
    return self._models[leg.is_dense][leg.size]

  def config_of(self, leg: Leg) -> Config:
    u = self.unit
    if leg.schedule == "cosine":
      config = with_schedule(self.config, leg.length * u, 0, schedule="warmup_cosine")
    else:
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
      state = run.grown(state, self.model(before), self.config_of(leg).growth)
    return run.restarted(state) if leg.schedule == "cosine" else state

  def _key(self, leg: Leg) -> tuple[Config, ModelConfig]:
    return self.config_of(leg), self.model(leg)

  def _before(self, leg: Leg) -> Leg | None:
    return next((other for other in self.legs if other.name == leg.after), None)

  def path_flops(self, leg: Leg) -> float:
    """The FLOPs of everything that leads to the end of a leg."""
    before = self._before(leg)
    return (leg.stop - leg.start) * self.unit_flops(leg) + (self.path_flops(before) if before else 0.0)

  @property
  def scratch_flops(self) -> float:
    """The FLOPs of the largest size from scratch."""
    return SCRATCH * self._unit_flops[0][3]

  def unit_flops(self, leg: Leg) -> float:
    return self._unit_flops[leg.is_dense][leg.size]


def _token_model(count: int, **changes) -> ModelConfig:
  fields = dict(qkv_tokens=count, proj_tokens=count, ffn_tokens=4 * count) | changes
  return ModelConfig(vocab_size=384, num_layers=2, hidden_size=64, num_heads=4, seq_length=128, **fields)


def _dense_model(rows: int) -> ModelConfig:
  dense = dict(attention=AttentionConfig(projection="dense"), ffn=FeedForwardConfig(kind="mlp"))
  return _token_model(0, ffn_tokens=rows, **dense)


def _dense_rows(counts: list[int]) -> list[int]:
  """Hidden units that give a dense Transformer about as many parameters, each number a multiple of the one before."""
  width = _token_model(1).hidden_size
  wanted = [max(8 * count - 2 * width, 1) for count in counts]
  rows = wanted[:1]
  for number in wanted[1:]:
    rows.append(max(round(number / rows[-1]), 2) * rows[-1])
  return rows


def report(protocol: Protocol, seeds: tuple[int, ...]) -> None:
  """Prints the last loss and the FLOPs of every leg that is done, and draws loss over FLOPs."""
  done = [leg for leg in protocol.legs if protocol.losses(leg, seeds)]
  print(
    "\n| leg | rate | parameters | tokens seen | PFLOPs | share | held-out loss (by seed) | perplexity |\n"
    + "|---" * 8
    + "|"
  )
  for leg in done:
    last = [each[leg.stop] for each in protocol.losses(leg, seeds).values()]
    model, flops = protocol.model(leg), protocol.path_flops(leg)
    tokens = leg.stop * protocol.unit * protocol.config.data.batch_size * model.seq_length
    print(
      f"| {leg.name} | {leg.schedule} | {model.num_non_embedding_parameters:,} | {tokens / 1e6:.1f}M "
      f"| {flops / 1e15:.4f} | {flops / protocol.scratch_flops:.1%} "
      f"| {np.mean(last):.4f} ({', '.join(f'{loss:.4f}' for loss in last)}) | {np.exp(np.mean(last)):.4f} |"
    )
  print(f"\n{plot(protocol, done, seeds, protocol.folder / 'paper_protocol.png')}")


def plot(protocol: Protocol, legs: list[Leg], seeds: tuple[int, ...], path: pathlib.Path) -> pathlib.Path:
  """Loss over FLOPs, the mean of the seeds; a dot is the end of a run whose rate has fallen."""
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  groups = [*GROWTHS, "scratch", "equal", "longer"]
  for leg in legs:
    losses = list(protocol.losses(leg, seeds).values())
    units = sorted(losses[0])[1:] if leg.after is None else sorted(losses[0])  # Without the loss before training.
    mean = [np.mean([each[unit] for each in losses]) for unit in units]
    end = protocol.path_flops(leg)
    share = [(end - (leg.stop - unit) * protocol.unit_flops(leg)) / protocol.scratch_flops for unit in units]
    group = leg.name.split()[0]
    axes.plot(share, mean, color=f"C{groups.index(group)}")
    if leg.schedule != "constant":
      axes.plot(share[-1], mean[-1], "o", color=f"C{groups.index(group)}")
      axes.annotate(f"{leg.name}", (share[-1], mean[-1]), (4, 4), textcoords="offset points", fontsize="small")
  axes.set(xscale="log", xlabel="training FLOPs, all stages, over those of the largest from scratch")
  axes.set_ylabel("held-out loss (nats a byte)")
  figure.savefig(path, dpi=80)
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
