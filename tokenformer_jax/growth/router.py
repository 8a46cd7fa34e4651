"""A router for a trained model that has none: its parameter tokens become groups, and its function stays."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import TextModel
from tokenformer_jax.models.model_class import model_class
from tokenformer_jax.nn.parameters import Tree, split


def with_router(
  model: TextModel, *, group_tokens: int, chosen: int | None = None, seed: int = 0, **losses: float
) -> Any:
  """A copy of a model whose feed-forwards' parameter tokens are in groups (`nn.token_groups`), with new routers.

      routed = with_router(tf.load("runs/plain"), group_tokens=576)
      bigger, _ = tf.grow(routed, ffn_tokens=9216)     # each token attends to as many groups as before

  The function is that of `model` where all groups are chosen, which is the default. Growth then adds groups and keeps it
  too. A training run does the same with `init_from` and the two fields of `model.ffn` in its configuration.

  Args:
    model: a language model or an encoder of texts with a feed-forward of parameter tokens; it is not changed.
    group_tokens: the number of tokens in a group; it divides `ffn_tokens`.
    chosen: the number of groups that each token attends to; None is all that there are.
    seed: of the routers.
    losses: `balance` and `router_z` of `FeedForwardConfig`.

  Raises:
    ValueError: the model has a router or no such feed-forward, or the groups do not fit.
  """
  config = model.config
  if config.ffn.has_router:
    raise ValueError(f"ffn={config.ffn}: the model has a router already; grow it to add groups.")
  if chosen is None:
    chosen = max(config.ffn_tokens // max(group_tokens, 1), 1)
  changes: dict[str, Any] = dict(group_tokens=group_tokens, chosen=chosen, **losses)
  config = dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, **changes))
  graphdef, *_ = split(nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0))))
  _, parameters, tau = split(model)
  return nnx.merge(graphdef, jax.jit(lambda tree: with_new_leaves(tree, config, seed))(parameters), tau)


def with_new_leaves(parameters: Tree, config: ModelConfig, seed: int) -> Tree:
  """The parameters of a model of `config`: those that are given, and for all others those of a new model.

  Args:
    parameters: as `nn.parameters.split` returns them.
  """
  _, new, _ = split(model_class(config)(config, rngs=nnx.Rngs(seed)))

  def filled(new: Tree, given: Tree) -> Tree:
    return {
      name: given.get(name, leaf) if not isinstance(leaf, dict) else filled(leaf, given.get(name, {}))
      for name, leaf in new.items()
    }

  return filled(new, parameters)
