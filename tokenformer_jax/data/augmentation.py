"""From an image to the pixels that a model reads: resizing, and random changes in training.

The changes are Pillow's operations, with a NumPy generator each image's own, so that an image and a generator give the
same pixels in any process and thread.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tokenformer_jax.config.images import ImagesConfig

_ATTEMPTS = 10  # To draw a random crop that lies inside of the image.
_MAGNITUDE_STD = 0.5
_MODES = {1: "L", 3: "RGB"}


def pixels_of(
  image: Image.Image, size: int, channels: int, config: ImagesConfig, rng: np.random.Generator | None
) -> np.ndarray:
  """uint8 [size, size, channels].

  Args:
    image: of any mode; it is converted to grey or colours.
    size: height and width of the model's images.
    channels: 1 or 3.
    config: what happens to it.
    rng: for the random changes; None makes none.

  Raises:
    ValueError: the image has another size than the model's and `config` does not resize it.
  """
  image = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
  if rng is not None and config.smallest_crop < 1:
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=random_crop(image.size, config.smallest_crop, rng))
  elif config.resize:
    image = _centre(image, config.resize, size)
  elif image.size != (size, size):
    width, height = image.size
    raise ValueError(
      f"is {height} × {width}, and the model reads {size} × {size}: set data.images.resize, or model.vision.image_size"
    )
  if rng is not None:
    image = _changed(image, config, rng)
  return np.asarray(image).reshape(size, size, channels)


def _centre(image: Image.Image, shorter: int, size: int) -> Image.Image:
  """The central square of `size` pixels, after the shorter side was resized to `shorter`; in one resampling."""
  width, height = image.size
  side = min(width, height) * size / shorter
  left, top = (width - side) / 2, (height - side) / 2
  return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _changed(image: Image.Image, config: ImagesConfig, rng: np.random.Generator) -> Image.Image:
  if config.shift:
    left, top = rng.integers(-config.shift, config.shift, 2, endpoint=True).tolist()
    image = image.crop((left, top, left + image.width, top + image.height))
  if config.flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  for _ in range(config.randaugment):
    image = _randomly_changed(image, config, rng)
  return image


def random_crop(size: tuple[int, int], smallest: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
  """The box (left, top, right, bottom) of a random crop of an image of (width, height).

  Its area is a share of the image's between `smallest` and 1, the ratio of its sides is between 3/4 and 4/3, and it is
  the largest central crop of such a ratio where none was found in ten attempts.
  """
  width, height = size
  for _ in range(_ATTEMPTS):
    area = rng.uniform(smallest, 1.0) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  widest, highest = min(width, height * 4 / 3), min(height, width * 4 / 3)
  return (width - widest) / 2, (height - highest) / 2, (width + widest) / 2, (height + highest) / 2


def _affine(image: Image.Image, a: tuple[float, ...], fill) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, a, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhanced(enhance: Callable) -> Callable:
  return lambda image, level, sign, fill: enhance(image).enhance(1 + 0.9 * level * sign)


# `(image, level, sign, fill) -> image` with a level from 0 to 1 and a sign of 1 or −1; the set that is called `inc1` in
# the package timm, where every operation is stronger at a higher level, without its addition under a threshold.
_OPERATIONS: tuple[Callable, ...] = (
  lambda image, level, sign, fill: ImageOps.autocontrast(image),
  lambda image, level, sign, fill: ImageOps.equalize(image),
  lambda image, level, sign, fill: ImageOps.invert(image),
  lambda image, level, sign, fill: image.rotate(30 * level * sign, Image.Resampling.BICUBIC, fillcolor=fill),
  lambda image, level, sign, fill: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
  lambda image, level, sign, fill: ImageOps.solarize(image, 256 - int(256 * level)),
  _enhanced(ImageEnhance.Color),
  _enhanced(ImageEnhance.Contrast),
  _enhanced(ImageEnhance.Brightness),
  _enhanced(ImageEnhance.Sharpness),
  lambda image, level, sign, fill: _affine(image, (1, 0.3 * level * sign, 0, 0, 1, 0), fill),
  lambda image, level, sign, fill: _affine(image, (1, 0, 0, 0.3 * level * sign, 1, 0), fill),
  lambda image, level, sign, fill: _affine(image, (1, 0, 0.45 * level * sign * image.width, 0, 1, 0), fill),
  lambda image, level, sign, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * level * sign * image.height), fill),
)


def _randomly_changed(image: Image.Image, config: ImagesConfig, rng: np.random.Generator) -> Image.Image:
  """One operation of RandAugment, which half of the images get; what moves in has the colour of the mean."""
  operation, applied, sign = rng.integers(len(_OPERATIONS)), rng.random() < 0.5, rng.choice((-1, 1))
  level = float(np.clip(rng.normal(config.magnitude, _MAGNITUDE_STD), 0, 10)) / 10
  if not applied:
    return image
  colour = [round(255 * mean) for mean in config.mean]
  fill = colour[0] if image.mode == "L" else tuple(colour * 3 if len(colour) == 1 else colour)
  return _OPERATIONS[operation](image, level, int(sign), fill)
