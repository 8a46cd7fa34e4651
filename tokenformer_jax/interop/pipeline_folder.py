"""Checkpoint folders of DeepSpeed's pipeline, as the released training code writes them: one file for each layer.

    global_step143000/layer_00-model_00-model_states.pt   the embedding
                      layer_02-model_00-model_states.pt   the first layer, and so on
    latest                                                a text file with the name of the newest such folder

The number of a file is the layer's position in the sequential model, and its names lack the prefix `sequential.N.`.
"""

import re

from etils import epath

from tokenformer_jax.interop.stored_array import StoredArray, Weights, quoted
from tokenformer_jax.interop.torch_file import read_torch

_LAYER_FILE = re.compile(r"layer_(\d{2,4})-model_(\d{2,4})-model_states\.pt")
_LARGEST_LATEST = 4096


def newest_step(folder: epath.Path) -> epath.Path:
  """Returns the folder that the file `latest` in `folder` names, or `folder` itself if it has no such file.

  Raises:
    ValueError: `latest` does not name a folder beside it.
  """
  latest = folder / "latest"
  if not latest.is_file():
    return folder
  with latest.open("rb") as file:
    name = file.read(_LARGEST_LATEST).decode("utf-8", errors="replace").strip()
  if not re.fullmatch(r"\w[\w.-]*", name) or not (folder / name).is_dir():
    raise ValueError(f"{latest}: names {quoted(name)}, which is not a folder beside it; give the step's own folder.")
  return folder / name


def is_pipeline_folder(folder: epath.Path) -> bool:
  """Whether `folder` has files of single layers."""
  return any(_LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_pipeline_folder(folder: epath.Path) -> Weights:
  """Reads the descriptions of all layer files; the arrays are read later.

  Args:
    folder: the folder of one step.

  Returns:
    The arrays under the names `sequential.N.…` of the released state dict.

  Raises:
    ValueError: the model is split over several model-parallel ranks, or a file is damaged.
  """
  found = [(match, path) for path in folder.iterdir() if (match := _LAYER_FILE.fullmatch(path.name))]
  ranks = sorted({int(match[2]) for match, _ in found})
  if ranks != [0]:
    raise ValueError(
      f"{folder}: its layers are split over the model-parallel ranks {quoted(ranks)}; only rank 0 alone can be read. "
      "Save the model again with model_parallel_size 1."
    )
  arrays: dict[str, StoredArray] = {}
  for match, path in sorted(found, key=lambda pair: int(pair[0][1])):
    layer = read_torch(path).arrays
    arrays |= {f"sequential.{int(match[1])}.{name}": array for name, array in layer.items()}
  return Weights(str(folder), arrays)
