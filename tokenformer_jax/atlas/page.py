"""The atlas as one page that needs nothing but a browser."""

import base64
import gzip
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence

import numpy as np

from tokenformer_jax.atlas.observe import ObservedLayer


def make_page(title: str, pieces: Mapping[int, str], rows: np.ndarray, layers: Sequence[ObservedLayer]) -> str:
  """Returns the HTML of the atlas, with all data and no reference to other files.

  Args:
    title: of the page.
    pieces: the text of each id that occurs in `rows` or in the layers.
    rows: the text that was observed, int [R, T].
    layers: what was observed.
  """
  ids = sorted(pieces)
  number = np.zeros(max(ids) + 1, np.int32)
  number[ids] = np.arange(len(ids))
  arrays: list[np.ndarray] = []

  def stored(array: np.ndarray | None, dtype: str) -> int | None:
    """The number of an array in the page's list."""
    if array is None:
      return None
    arrays.append(np.ascontiguousarray(array, dtype))
    return len(arrays) - 1

  header = {
    "pieces": [pieces[i] for i in ids],
    "length": rows.shape[1],
    "text": stored(number[rows], "<u4"),
    "layers": [
      {
        "name": layer.name,
        "tokens": len(layer.use),
        "use": stored(layer.use, "<f4"),
        "places": stored(layer.places, "<u4"),
        "weights": stored(layer.weights, "<f4"),
        "neighbours": stored(layer.neighbours, "<u4"),
        "raised": stored(None if layer.raised is None else number[layer.raised], "<u4"),
        "lowered": stored(None if layer.lowered is None else number[layer.lowered], "<u4"),
        "born": stored(layer.born, "<u4"),
      }
      for layer in layers
    ],
    "arrays": [[array.dtype.kind, array.size] for array in arrays],
  }
  head = json.dumps(header).encode()
  head += b" " * (-len(head) % 4)
  body = b"".join([len(head).to_bytes(4, "little"), head, *(array.tobytes() for array in arrays)])
  template = importlib.resources.files("tokenformer_jax.atlas").joinpath("page.html").read_text(encoding="utf-8")
  packed = base64.b64encode(gzip.compress(body, mtime=0)).decode()
  return template.replace("{{title}}", html.escape(title)).replace("{{data}}", packed)
