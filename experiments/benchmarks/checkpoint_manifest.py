"""What the manifest of a checkpoint costs: writing and verifying the SHA-256 of 1 GB in ten files.

python -m experiments.benchmarks.checkpoint_manifest [--out=FOLDER]
"""

import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags
from etils import epath

from tokenformer_jax.training import manifest

_OUT = flags.DEFINE_string("out", None, "Folder on the disk to measure; by default the system's temporary folder.")
_FILES, _BYTES = 10, 10**8


def measured(what: str, function) -> None:
  wall, processor = time.perf_counter(), time.process_time()
  assert not function()
  print(f"{what}: {time.perf_counter() - wall:.2f} s, processor {time.process_time() - processor:.2f} s", flush=True)


def main(argv):
  del argv
  with tempfile.TemporaryDirectory(dir=_OUT.value) as folder:
    unfinished = pathlib.Path(folder, "5.unfinished")
    for part in ("model", "optimizer", "record"):
      (unfinished / part).mkdir(parents=True)
    (unfinished / "record" / "metadata").write_text('{"format": 1}')
    draw = np.random.default_rng(0)
    for number in range(_FILES):
      (unfinished / "model" / str(number)).write_bytes(draw.bytes(_BYTES))
    measured("write", lambda: manifest.write_manifest(epath.Path(unfinished)))
    step = epath.Path(unfinished.rename(unfinished.with_name("5")))
    measured("verify", lambda: manifest.damaged(step))
    measured("list", lambda: manifest.incomplete(step))


if __name__ == "__main__":
  app.run(main)
