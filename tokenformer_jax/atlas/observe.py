"""How each parameter token of a language model is used on a text, and what its value says."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.layers import leaves_by_path, token_layers
from tokenformer_jax.growth.usage import weights_and_mass
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.depth_routing import RoutedBlock
from tokenformer_jax.nn.experts import Experts
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import recorded_inputs

WRITERS = ("proj", "ffn")  # The values of these layers are added to the stream that the logits are read from.
_TOKENS_AT_ONCE = 512  # Of a layer, whose logits exist at once.


@dataclasses.dataclass(frozen=True)
class ObservedLayer:
  """The N parameter tokens, or hidden units, of one layer.

  Attributes:
    name: number and path of the layer, e.g. `3 ffn`.
    use: float32 [N], E|w_n| · ‖v_n‖₂, the mean absolute contribution of a token's value.
    places: int32 [N, contexts], the positions of the text in which the token's weight |w_n| is largest, falling; at
      most one of each row.
    weights: float32 [N, contexts], w_n there.
    neighbours: int32 [N, neighbours], the tokens of the layer whose keys point most nearly the same way.
    raised, lowered: int32 [N, ids], the ids whose logits the value raises and lowers most where it is added to the
      stream that the logits are read from, else None. The final norm is taken at its scale, without what it divides by.
    born: int32 [N], how many updates were done before the token was added; None where that is not known.
  """

  name: str
  use: np.ndarray
  places: np.ndarray
  weights: np.ndarray
  neighbours: np.ndarray
  raised: np.ndarray | None = None
  lowered: np.ndarray | None = None
  born: np.ndarray | None = None


def observe(
  model: LanguageModel,
  rows: np.ndarray,
  *,
  contexts: int = 4,
  ids: int = 5,
  neighbours: int = 3,
  births: Mapping[str, np.ndarray] | None = None,
  batch_size: int = 8,
) -> list[ObservedLayer]:
  """Observes every layer of parameter tokens of a language model on a text, block by block.

  Args:
    model: the model.
    rows: token ids, int [R, T]; position p of the text is rows.ravel()[p].
    contexts, ids, neighbours: how many of each are kept for a token, or all where there are fewer.
    births: int [N] for each path of a layer, see `ObservedLayer.born`.
    batch_size: rows that are computed at once.

  Raises:
    ValueError: the model is no `LanguageModel`, or has routers, whose rows see only some of the tokens; there are no
      rows; or ids are outside the vocabulary.
  """
  _check(model, rows)
  absolute, weights, places = _strongest_of_text(model, rows, contexts, batch_size)
  parameters = leaves_by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  observed = []
  for path in token_layers(model):
    keys, values = (np.asarray(parameters[f"{path}/{name}"], np.float32) for name in ("keys", "values"))
    for index, name in _layers(path, model.config):
      raised, lowered = _logits(values[index], model, ids) if path.rpartition("/")[2] in WRITERS else (None, None)
      norms = np.linalg.norm(values[index], axis=-1)
      observed.append(
        ObservedLayer(
          name=name,
          use=(norms * absolute[path][index] / rows.size).astype(np.float32),
          places=places[path][index].astype(np.int32),
          weights=weights[path][index],
          neighbours=_neighbours(keys[index], neighbours),
          raised=raised,
          lowered=lowered,
          born=None if births is None else births[path],
        )
      )
  return sorted(observed, key=lambda layer: int(layer.name.split()[0]))


def _check(model: Any, rows: np.ndarray) -> None:
  if not isinstance(model, LanguageModel):
    raise ValueError(f"model is a {type(model).__name__}: the atlas shows language models; give a LanguageModel.")
  for _, module in nnx.iter_modules(model):
    if isinstance(module, (Experts, RoutedBlock)):
      raise ValueError(
        f"the model has a router ({type(module).__name__}), whose rows see only some of the tokens; the atlas shows models "
        "without routers."
      )
  if rows.ndim != 2 or not rows.size:
    raise ValueError(f"rows {rows.shape}: expected token ids [R, T], at least one.")
  if rows.min() < 0 or rows.max() >= model.config.vocab_size:
    raise ValueError(
      f"rows: ids from {rows.min()} to {rows.max()}; expected 0 to {model.config.vocab_size - 1}, the model's vocabulary."
    )


def _layers(path: str, config: ModelConfig) -> Iterator[tuple[Any, str]]:
  """(index along the leading axis, name) of each layer under a path of the model."""
  root, _, name = path.partition("/")
  if root == "first":
    yield ..., f"0 {name}"
  else:
    first = int(config.has_first_block)
    for index in range(config.num_layers - first):
      yield index, f"{first + index} {name}"


def _strongest_of_text(model: LanguageModel, rows: np.ndarray, contexts: int, batch_size: int):
  """By path: Σ|w| [..., N], and of the positions with the largest |w| the weights and numbers [..., N, contexts]."""
  graphdef, params, tau = split(model)

  @jax.jit
  def strongest(params, tau, batch, real):
    def count(block, x, context):
      with recorded_inputs() as recorded:
        x, _, _ = block(x, context.observed())
      paths = {id(layer): "/".join(map(str, path)) for path, layer in nnx.iter_modules(block)}
      return x, {paths[id(layer)]: _strongest(layer, inputs, real, contexts) for layer, inputs in recorded}

    observed = nnx.merge(graphdef, params, tau).through_layers(count, batch)[1]
    return {f"{root}/{path}": each for root, members in observed.items() for path, each in members.items()}

  total: dict[str, tuple] = {}
  size = min(batch_size, len(rows))
  for start in tqdm.tqdm(range(0, len(rows), size), "text", unit="batch", disable=None):
    batch = rows[start : start + size]
    real = np.arange(size) < len(batch)
    batch = np.concatenate([batch, np.zeros((size - len(batch), rows.shape[1]), batch.dtype)])
    for path, (absolute, weights, places) in jax.device_get(
      strongest(params, tau, batch.astype(np.int32), real)
    ).items():
      found = (absolute.astype(np.float64), weights, places + start * rows.shape[1])
      total[path] = _merged(total[path], found, contexts) if path in total else found
  return tuple({path: each[part] for path, each in total.items()} for part in range(3))


def _strongest(layer: Any, x: jax.Array, real: jax.Array, contexts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(Σ|w| [N], weights [N, contexts], places [N, contexts]) of a layer for x [B, T, d], in the rows that are `real` [B]."""
  rows, length = x.shape[:2]
  weights_NxBxT = weights_and_mass(layer, x)[0].T.astype(jnp.float32).reshape(-1, rows, length)
  absolute_NxBxT = jnp.where(real[None, :, None], jnp.abs(weights_NxBxT), 0.0)
  time_NxB = jnp.argmax(absolute_NxBxT, axis=2)
  of_rows_NxB = jnp.where(real[None], jnp.max(absolute_NxBxT, axis=2), -1.0)
  _, rows_NxK = jax.lax.top_k(of_rows_NxB, min(contexts, rows))
  places_NxK = rows_NxK * length + jnp.take_along_axis(time_NxB, rows_NxK, axis=1)
  flat_NxM = jnp.where(real[None, :, None], weights_NxBxT, 0.0).reshape(-1, rows * length)
  weights_NxK = jnp.take_along_axis(flat_NxM, places_NxK, axis=1)
  return jnp.sum(absolute_NxBxT, axis=(1, 2)), weights_NxK, places_NxK.astype(jnp.int32)


def _merged(one: tuple, other: tuple, contexts: int) -> tuple:
  """What two parts of a text have together."""
  weights, places = (np.concatenate([one[part], other[part]], axis=-1) for part in (1, 2))
  order = np.argsort(-np.abs(weights), axis=-1, kind="stable")[..., :contexts]
  return one[0] + other[0], *(np.take_along_axis(part, order, axis=-1) for part in (weights, places))


def _logits(values: np.ndarray, model: LanguageModel, ids: int) -> tuple[np.ndarray, np.ndarray]:
  """(the ids whose logits the values [N, d] raise most, and lower most), int32 [N, ids]."""
  norm, table = model.final_norm, model.table().astype(jnp.float32)
  if norm.kind in ("plain", "layer_norm"):
    values = values - values.mean(axis=-1, keepdims=True)
  if norm.scale is not None:
    values = values * np.asarray(norm.scale[...])

  @jax.jit
  def extremes(values):
    logits = values @ table.T
    return [jax.lax.top_k(sign * logits, min(ids, len(table)))[1] for sign in (1, -1)]

  parts = [extremes(jnp.asarray(values[i : i + _TOKENS_AT_ONCE])) for i in range(0, len(values), _TOKENS_AT_ONCE)]
  raised, lowered = (np.concatenate(part).astype(np.int32) for part in zip(*jax.device_get(parts)))
  return raised, lowered


def _neighbours(keys: np.ndarray, neighbours: int) -> np.ndarray:
  """The tokens with the largest cosine of keys, nearest first, int32 [N, neighbours]."""
  unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-30)
  cosines = unit @ unit.T
  np.fill_diagonal(cosines, -np.inf)
  return np.argsort(-cosines, axis=-1, kind="stable")[:, : min(neighbours, len(keys) - 1)].astype(np.int32)
