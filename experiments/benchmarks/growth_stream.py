"""Growing a checkpoint from 768 MB to 1.5 GB: memory and time, compared with plain Orbax and with growth in memory.

    python experiments/benchmarks/growth_stream.py

The checkpoint is a whole training state (parameters and both moments, float32, random). `cli.grow` reads, grows and writes
it in slices. `plain Orbax` restores leaf by leaf into the grown shapes (with zeros for new rows) and saves each leaf with
the partial save of `orbax.checkpoint.v1`, without any check. `in memory` restores everything, grows it, and saves it. Each
runs in a process of its own; they alternate. `tiny` is `cli.grow` on a model of 56 kB, the cost of imports, XLA and files.

Two CPU cores that were also busy with other work (load 11 to 16, so compare CPU seconds), November 2026, Python 3.11.7,
jax 0.10.2, orbax-checkpoint 0.12.8; `--turns=2`:

    712 MB -> 832 MB on disk
    way            seconds   CPU seconds   peak memory, MB   above tiny
    cli.grow          59.4           7.2               445          104
    plain Orbax       90.7          10.4               600          258
    in memory         54.4           9.7              3417         3076
    tiny              49.0           4.5               341            0

On disk the moments of new rows, which are zeros, are compressed. In memory the state has 770 MB, then 1,538 MB.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from orbax.checkpoint import v1

from tokenformer_jax import data
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.plan import leaves_by_path, path_name, plan_growth
from tokenformer_jax.training.checkpoints import TOKENIZER, Checkpoints
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resize import grow_run
from tokenformer_jax.training.resume import CONFIG

_TURNS = flags.DEFINE_integer("turns", 3, "Runs of each method; the least time and the most memory are reported.")
_WAY = flags.DEFINE_string(
  "way", None, "Run one method and print its cost; the benchmark starts itself with this flag."
)
_FOLDER = flags.DEFINE_string("folder", None, "With --way: the folder of the checkpoint.")

STEP = 100
MODEL = ModelConfig(
  vocab_size=264,
  num_layers=12,
  hidden_size=768,
  num_heads=12,
  qkv_tokens=496,
  proj_tokens=496,
  ffn_tokens=1488,
  seq_length=16,
)
GROWN = MODEL.grown(qkv_tokens=992, proj_tokens=992, ffn_tokens=2976)


TINY = ModelConfig(
  vocab_size=264, num_layers=2, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=24, seq_length=16
)


def program(model: ModelConfig):
  return make_program(Config(model=model), model, make_mesh(devices=jax.devices()[:1]))


def source(folder: pathlib.Path, model: ModelConfig) -> None:
  """Writes the work folder of a run of `model` at step STEP."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = rng.standard_normal(leaf.shape, np.float32) if leaf.dtype == np.float32 else np.full(leaf.shape, 0)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  tokenizer = data.open_tokenizer("bytes")
  state = jax.tree.map(draw, program(model).shapes)
  config = Config(model=model).to_dict()
  checkpoints = Checkpoints(str(folder))
  checkpoints.save(
    STEP,
    state,
    {"model": config["model"], "config": config, "data": {}, "fingerprint": {}, "tokenizer": tokenizer.fingerprint},
  )
  checkpoints.close()
  (folder / CONFIG).write_text(json.dumps(config))
  data.save_tokenizer(tokenizer, folder / TOKENIZER)


def stream(folder: pathlib.Path) -> None:
  grow_run(
    str(folder / "source"),
    str(folder / "stream"),
    qkv_tokens=GROWN.qkv_tokens,
    proj_tokens=GROWN.proj_tokens,
    ffn_tokens=GROWN.ffn_tokens,
  )


def tiny(folder: pathlib.Path) -> None:
  grow_run(str(folder / "tiny source"), str(folder / "tiny"), qkv_tokens=16, proj_tokens=16, ffn_tokens=48)


def plain(folder: pathlib.Path) -> None:
  """Restores each leaf into its grown shape and saves it, one after the other."""
  shapes = program(MODEL).shapes
  plan = plan_growth(shapes, MODEL, GROWN)
  optimizer = {field.name: getattr(shapes, field.name) for field in dataclasses.fields(shapes)}
  items = {"model": {name: optimizer.pop(name) for name in ("params", "tau")}, "optimizer": optimizer}
  for item, tree in items.items():
    with ocp.PyTreeCheckpointer() as checkpointer:
      for path, leaf in leaves_by_path(tree).items():
        args = ocp.ArrayRestoreArgs(global_shape=plan[path].new_shape, strict=False, sharding=leaf.sharding)

        def only(given, path=path):
          return jax.tree_util.tree_map_with_path(lambda p, _: given if path_name(p) == path else ocp.PLACEHOLDER, tree)

        restored = checkpointer.restore(
          folder / "source" / "checkpoints" / str(STEP) / item,
          args=ocp.args.PyTreeRestore(item=only(leaf), restore_args=only(args)),
        )
        array = leaves_by_path(restored)[path]
        assert array.shape == plan[path].new_shape
        v1.partial.save(folder / "plain" / item, {path.replace("/", "."): array})
    v1.partial.finalize(folder / "plain" / item)


def memory(folder: pathlib.Path) -> None:
  state = Checkpoints(str(folder / "source")).restore(STEP, program(MODEL).shapes)
  state, *_ = grow_state(state, MODEL, GROWN)
  target = Checkpoints(str(folder / "memory"))
  target.save(STEP, state, {})
  target.close()


WAYS = {"cli.grow": stream, "plain Orbax": plain, "in memory": memory, "tiny": tiny}


def main(argv):
  del argv
  if _WAY.value == "source":
    source(pathlib.Path(_FOLDER.value, "source"), MODEL)
    return source(pathlib.Path(_FOLDER.value, "tiny source"), TINY)
  if _WAY.value:
    start, cpu = time.perf_counter(), time.process_time()
    WAYS[_WAY.value](pathlib.Path(_FOLDER.value))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return print(json.dumps([time.perf_counter() - start, time.process_time() - cpu, peak]))
  took = {way: [] for way in WAYS}
  for _ in range(_TURNS.value):
    with tempfile.TemporaryDirectory() as folder:
      measured("source", folder)
      for way in WAYS:
        took[way].append(json.loads(measured(way, folder).splitlines()[-1]))
      sizes = [
        sum(path.stat().st_size for path in pathlib.Path(folder, name).rglob("*") if path.is_file())
        for name in ("source", "stream")
      ]
  print(
    f"{sizes[0] / 1e6:.0f} MB -> {sizes[1] / 1e6:.0f} MB on disk\n"
    "way            seconds   CPU seconds   peak memory, MB   above tiny"
  )
  least = max(peak for _, _, peak in took["tiny"])
  for way, runs in took.items():
    wall, cpu, peak = (pick(column) for pick, column in zip((min, min, max), zip(*runs)))
    print(f"{way:12} {wall:9.1f} {cpu:13.1f} {peak / 1e6:17.0f} {(peak - least) / 1e6:12.0f}")
  return None


def measured(way: str, folder: str) -> str:
  command = [sys.executable, __file__, f"--way={way}", f"--folder={folder}"]
  return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
  command.run(main)
