"""Growth of a whole training state: in memory on the device, and streamed from one checkpoint to another."""

import json
import pathlib
import tempfile
import time

import jax

from tokenformer_jax.config import TOKEN_COUNTS, Config, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.training.program import make_program


def run(results, clock, tiny):
  for name in ["tiny"] if tiny else ["150m", "450m"]:
    for way, grow in (("in memory", _in_memory), ("in memory, donated", _donated), ("streamed", _streamed)):
      if clock.left < 10 and not tiny:
        results.add(
          "growth", "Growth to twice the parameter tokens", size=name, way=way, note="skipped: no time was left"
        )
        continue
      try:
        results.add("growth", "Growth to twice the parameter tokens", size=name, way=way, **grow(name))
      except Exception as error:
        note = f"failed: {type(error).__name__}: {str(error)[:300]}"
        results.add("growth", "Growth to twice the parameter tokens", size=name, way=way, note=note)


def _program_and_target(name):
  model = ModelConfig.named(name)
  counts = {count: 2 * getattr(model, count) for count in TOKEN_COUNTS}
  program = make_program(Config(model=model), model, make_mesh(devices=jax.devices()[:1]))
  return program, counts


def _in_memory(name, donate=False):
  program, counts = _program_and_target(name)
  target = program.model.grown(**counts)
  seconds = []
  for _ in range(2):  # The first growth compiles a program for each shape of a leaf.
    state = program.initial_state()
    jax.block_until_ready(state)
    begin = time.perf_counter()
    grown, *_ = grow_state(state, program.model, target, donate=donate)
    jax.block_until_ready(grown)
    seconds.append(time.perf_counter() - begin)
    size = _bytes(program.shapes), _bytes(grown)
    del state, grown
  return {"first s": seconds[0], "again s": seconds[1], "GB before": size[0] / 1e9, "GB after": size[1] / 1e9}


def _donated(name):
  return _in_memory(name, donate=True)


def _streamed(name):
  # Imported only here, because these import readers of data sets, which an accelerator's image may lack.
  from tokenformer_jax import data
  from tokenformer_jax.training.checkpoints import TOKENIZER, Checkpoints
  from tokenformer_jax.training.resize import grow_run
  from tokenformer_jax.training.resume import CONFIG

  program, counts = _program_and_target(name)
  state, tokenizer = program.initial_state(), data.open_tokenizer("bytes")
  with tempfile.TemporaryDirectory() as folder:
    source, config = pathlib.Path(folder, "source"), Config(model=program.model).to_dict()
    checkpoints = Checkpoints(str(source))
    record = {"model": config["model"], "config": config, "data": {}, "fingerprint": {}}
    begin = time.perf_counter()
    checkpoints.save(0, state, record | {"tokenizer": tokenizer.fingerprint})
    checkpoints.close()
    saved = time.perf_counter() - begin
    (source / CONFIG).write_text(json.dumps(config))
    data.save_tokenizer(tokenizer, source / TOKENIZER)
    begin = time.perf_counter()
    grow_run(str(source), str(pathlib.Path(folder, "grown")), **counts)
    return {"first s": time.perf_counter() - begin, "GB before": _bytes(state) / 1e9, "saved before in s": saved}


def _bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
