"""How images become the inputs of a Hugging Face model: the preprocessor_config.json beside its weights."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from tokenformer_jax.interop.hub import NORMALISATION, local_path
from tokenformer_jax.interop.stored_array import quoted

# Pillow's filters by their numbers, which the file has: nearest, Lanczos, bilinear, bicubic, box and Hamming.
_FILTERS = range(6)
_UNSUPPORTED = {"do_center_crop": False, "do_pad": False, "do_flip_channel_order": False}


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
  """Resizes images to the model's size without regard to the ratio of their sides, and normalises their pixels.

  Attributes:
    height, width: of the model's images; 0 leaves images as they are.
    mean, std: a pixel p becomes (rescale · p − mean) / std, one number for each channel; () leaves it at rescale · p.
    rescale: the factor of the bytes of a pixel, usually 1 / 255.
    resample: the number of Pillow's filter; 2 is bilinear.
  """

  height: int
  width: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  rescale: float
  resample: int

  def __call__(self, images: Iterable[Any]) -> np.ndarray:
    """Float32 [B, H, W, C] of Pillow's images, or of arrays of bytes [h, w, C].

    Raises:
      ValueError: an image has another number of channels than the mean.
    """
    from PIL import Image

    rows: list[np.ndarray] = []
    for image in images:
      image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
      if self.height and image.size != (self.width, self.height):
        image = image.resize((self.width, self.height), Image.Resampling(self.resample))
      pixels = np.asarray(image, np.float64)
      pixels = (pixels if pixels.ndim == 3 else pixels[..., None]) * self.rescale
      if self.mean:
        if pixels.shape[-1] != len(self.mean):
          raise ValueError(
            f"image {len(rows)}: it has {pixels.shape[-1]} channels and the model {len(self.mean)}; convert it, e.g. by "
            "image.convert('RGB')."
          )
        pixels = (pixels - self.mean) / self.std
      rows.append(pixels.astype(np.float32))
    return np.stack(rows)


def image_preprocessor(path_or_hub_id: str | os.PathLike) -> ImagePreprocessor:
  """The preprocessing of the images of a model, from the preprocessor_config.json of its folder.

  Args:
    path_or_hub_id: the folder or a file in it, or the name OWNER/MODEL of a model on the Hugging Face hub.

  Raises:
    ValueError: there is no such file, or it asks for what is not supported; the one message names all such fields.
  """
  path = local_path(path_or_hub_id)
  file = (path if path.is_dir() else path.parent) / NORMALISATION
  fields = _read(file)
  faults = [
    f"{name}={quoted(fields[name])} is not supported, only {only}"
    for name, only in _UNSUPPORTED.items()
    if fields.get(name) not in (None, only)
  ]
  height, width = _size(fields.get("size"), faults) if fields.get("do_resize", True) else (0, 0)
  mean, std = ((), ()) if not fields.get("do_normalize", True) else _mean_and_std(fields, faults)
  rescale = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
  if not _is_positive(rescale):
    faults.append(f"rescale_factor={quoted(rescale)} is not a positive number")
  resample = fields.get("resample", 2)
  if type(resample) is not int or resample not in _FILTERS:
    faults.append(f"resample={quoted(resample)} is not one of Pillow's filters 0 to {_FILTERS[-1]}")
  if faults:
    raise ValueError(f"{file}: {'; '.join(faults)}.")
  return ImagePreprocessor(height, width, mean, std, float(rescale), resample)


def _read(file: epath.Path) -> dict[str, Any]:
  if not file.is_file():
    raise ValueError(f"{file}: there is no such file; images of this model are normalised by whoever gives them.")
  try:
    fields = json.loads(file.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not JSON ({error}).") from None
  if not isinstance(fields, dict):
    raise ValueError(f"{file}: holds a {type(fields).__name__}, not the fields of a preprocessor.")
  return fields


def _size(size: Any, faults: list[str]) -> tuple[int, int]:
  size = {"height": size, "width": size} if type(size) is int else size
  height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (0, 0)
  if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
    return height, width
  faults.append(f"size={quoted(size)} is not supported, only a number or height and width")
  return 0, 0


def _mean_and_std(fields: dict[str, Any], faults: list[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
  found: dict[str, Any] = {name: fields.get(name, [0.5] * 3) for name in ("image_mean", "image_std")}
  for name, value in found.items():
    numbers: list[Any] = value if isinstance(value, list) else [None]
    finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if not finite or (name == "image_std" and not all(map(_is_positive, numbers))):
      faults.append(f"{name}={quoted(value)} is not a list of numbers{', all positive' if name == 'image_std' else ''}")
      return (), ()
  mean, std = (tuple(map(float, value)) for value in found.values())
  if len(mean) != len(std):
    faults.append(f"image_mean={quoted(list(mean))} and image_std={quoted(list(std))} have different lengths")
  return mean, std


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value) and value > 0
