"""Loss and gradients of a small model on each mesh, compared with those on one device, as a table.

`python -m tests.equality_table` runs on 8 simulated CPU devices, in float32. A gradient's difference is
max|g − ĝ| / max|ĝ| of its leaf; the table has the largest of all leaves.
"""

import dataclasses

import jax
import numpy as np

from tests.test_sharded_model import CONFIG, MESHES, Case
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.nn.theta import THETAS


def main():
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_default_matmul_precision", "highest")
  print("| Θ | mesh | loss | gradients | furthest leaf |\n|---|---|---|---|---|")
  for theta in THETAS:
    case = Case(dataclasses.replace(CONFIG, theta=theta))
    loss, alone = case.alone
    for sizes in MESHES:
      step, arguments, _ = case.on(sizes)
      ours, gradients = step(*arguments)
      errors = {
        path: np.max(np.abs(np.asarray(g) - leaves_by_path(alone)[path])) / np.max(np.abs(leaves_by_path(alone)[path]))
        for path, g in leaves_by_path(gradients).items()
      }
      worst = max(errors, key=errors.get)
      shown = " ".join(f"{axis}={size}" for axis, size in sizes.items())
      print(
        f"| {theta} | {shown} | {abs(float(ours) / float(loss) - 1):.1e} | {errors[worst]:.1e} | {worst} |", flush=True
      )


if __name__ == "__main__":
  main()
