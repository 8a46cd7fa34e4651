"""Speculative decoding: a small model drafts tokens, and the large one checks them all in one forward pass.

With p the large model's probabilities of the next token and q the small one's, a drafted token x is kept with probability
min(1, p(x) / q(x)). In the place of the first that is not kept a token is drawn from max(p − q, 0), normalised; after a
draft that is kept as a whole, one from p. The tokens then have the large model's distribution (arXiv 2211.17192).

The rows of a batch share the length of their caches, so that all keep as many tokens as the row that keeps fewest; a row
that would keep more begins its next draft after them. At temperature 0 the text is that of the large model alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import mesh_of, platform, traced_on
from tokenformer_jax.distributed.processes import whole
from tokenformer_jax.inference.decoding import (
  are_finite,
  bucket,
  check_finite,
  compiler_options,
  decoding_programs,
  draw,
  left_padded,
  next_logits,
  slots,
)
from tokenformer_jax.inference.sampling import Sampling, greedy, kept, within_vocabulary
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.parameters import split


def check_draft(config: ModelConfig, draft: ModelConfig, vocab_size: int) -> None:
  """Raises ValueError unless a model can check the drafts of another.

  Args:
    config: the large model.
    draft: the small one.
    vocab_size: the number of ids of their tokenizer.
  """
  if draft.vocab_size < vocab_size:
    raise ValueError(
      f"the draft model has vocab_size={draft.vocab_size} and the tokenizer {vocab_size} ids: it was trained with "
      "another tokenizer; give a draft model with this one."
    )
  for name, one in (("model", config), ("draft model", draft)):
    if one.attention.shaped == "centred" or any(map(one.is_routed, range(one.num_layers))):
      what = "attention.shaped='centred'" if one.attention.shaped == "centred" else "depth routing"
      raise ValueError(
        f"the {name} has {what}, whose cache cannot take back tokens that are not kept; leave the draft out."
      )


def speculate(
  model,
  draft,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  num_drafted: int,
  ended: Callable[[], Sequence[bool]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (tokens [B], their log-probabilities [B]) one after the other, as `decoding.decode` does.

  Args:
    model, draft: the large model and the small one, or their `for_decoding()`.
    prompts: ids of each row.
    max_new_tokens: how many tokens are yielded.
    sampling: the settings, without a repetition penalty.
    num_drafted: tokens of a draft.
    ended: says which rows need no more tokens; the others do not wait for them.
  """
  tokens_BxT, start_B = left_padded(prompts)
  length = tokens_BxT.shape[1]
  most = bucket(length + max_new_tokens + num_drafted)
  num_slots = slots(length + num_drafted + 1, most)
  sides = [split(one.for_decoding()) for one in (model, draft)]
  leaves = [list(trees) for _, *trees in sides]
  mesh = mesh_of(leaves[0])
  logits, caches = [], []
  for (graphdef, *_), its in zip(sides, leaves):
    prefill, _ = decoding_programs(graphdef, mesh_of(its))
    logits_BxV, cache = prefill(its, tokens_BxT, start_B, num_slots=num_slots)
    logits.append(logits_BxV)
    caches.append(cache)
  check_finite(whole(are_finite(logits[0], sampling.vocab_size)))
  last_B = draw(logits[0], sampling, np.int32(0))
  yield whole(last_B), whole(_log_probs(logits[0][:, None], last_B[:, None], sampling))[:, 0]
  check = _program(*(graphdef for graphdef, *_ in sides), mesh, platform(mesh))
  done = 1
  while done < max_new_tokens:
    if length + done + num_drafted > num_slots:
      num_slots = slots(length + done + num_drafted, most)
      caches = [cache.with_slots(num_slots) for cache in caches]
    ended_B = np.asarray(ended(), bool)
    columns_BxN, log_probs_BxN, num_kept, last_B, caches = check(
      leaves, last_B, caches, sampling, np.int32(done), ended_B, num_drafted=num_drafted
    )
    columns_BxN, log_probs_BxN = whole(columns_BxN), whole(log_probs_BxN)
    for column in range(min(int(whole(num_kept)) + 1, max_new_tokens - done)):
      yield columns_BxN[:, column], log_probs_BxN[:, column]
    done += int(whole(num_kept)) + 1


@functools.lru_cache
def _program(graphdef, draft_graphdef, mesh, platform):
  """The jitted function that drafts tokens and checks them."""

  def check(leaves, last_B, caches, sampling, index, ended_B, *, num_drafted):
    model, draft = (nnx.merge(g, *its) for g, its in zip((graphdef, draft_graphdef), leaves))
    num_ids = min(model.config.vocab_size, draft.config.vocab_size)
    key = jax.random.fold_in(sampling.key, index)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(last_B)))

    def drafted(carry, number):
      tokens_B, cache = carry
      hidden_Bx1xD, cache = draft.extend(tokens_B[:, None], cache)
      q_BxV = jax.vmap(probabilities, in_axes=(0, None))(next_logits(draft, hidden_Bx1xD)[:, :num_ids], sampling)
      keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)
      tokens_B = jax.vmap(jax.random.categorical)(keys, jnp.log(q_BxV)).astype(jnp.int32)
      return (tokens_B, cache), (tokens_B, q_BxV)

    # One more step than tokens are drafted: it reads the last of them.
    numbers = jnp.arange(1, num_drafted + 2)
    (_, draft_cache), (tokens_NxB, q_NxBxV) = jax.lax.scan(drafted, (last_B, caches[1]), numbers)
    tokens_BxN, q_BxNxV = tokens_NxB[:-1].T, q_NxBxV[:-1].swapaxes(0, 1)

    hidden_BxNxD, cache = model.extend(jnp.concatenate([last_B[:, None], tokens_BxN], axis=1), caches[0])
    logits_BxNxV = model.logits(hidden_BxNxD)[..., :num_ids]
    p_BxNxV = jax.vmap(jax.vmap(probabilities, in_axes=(0, None)), in_axes=(0, None))(logits_BxNxV, sampling)
    accept_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, 0)
    kept_B, next_B = jax.vmap(accept)(p_BxNxV, q_BxNxV, tokens_BxN, accept_keys_B)

    num_kept = jnp.min(jnp.where(ended_B, num_drafted, kept_B))
    # A row that keeps more has kept the token in the place of the other rows' next one.
    columns_BxN = jnp.pad(tokens_BxN, ((0, 0), (0, 1)))
    last_B = jnp.where(kept_B > num_kept, columns_BxN[:, num_kept], next_B)
    columns_BxN = columns_BxN.at[:, num_kept].set(last_B)
    caches = [_shortened(cache, num_drafted - num_kept) for cache in (cache, draft_cache)]
    return columns_BxN, _log_probs(logits_BxNxV, columns_BxN, sampling), num_kept, last_B, caches

  return jax.jit(
    check if mesh is None else traced_on(mesh, check),
    donate_argnames="caches",
    static_argnames="num_drafted",
    compiler_options=compiler_options(platform),
  )


def _shortened(cache: KVCache, num_tokens: Int[Array, ""]) -> KVCache:
  """The cache without its last tokens: later ones are written over them, and until then nobody sees them."""
  return dataclasses.replace(cache, length=cache.length - num_tokens)


def probabilities(logits_V: Float[Array, "vocab"], sampling: Sampling) -> Float[Array, "vocab"]:
  """The probabilities with which `sampling.sample` draws each id, without a repetition penalty."""

  def of_highest(logits_V):
    return jax.nn.one_hot(greedy(within_vocabulary(logits_V, sampling.vocab_size)), len(logits_V), dtype=logits_V.dtype)

  return jax.lax.cond(
    sampling.temperature > 0, lambda logits_V: jax.nn.softmax(kept(logits_V, sampling)), of_highest, logits_V
  )


def accept(
  p: Float[Array, "after vocab"], q: Float[Array, "drafted vocab"], drafted: Int[Array, "drafted"], key: Array
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """(how many of a row's drafted tokens are kept, the token that follows the kept ones).

  Args:
    p: the large model's probabilities before each drafted token and after the last one, [N + 1, V].
    q: the small model's probabilities, with which the tokens were drawn, [N, V].
    drafted: the tokens [N].
    key: random key.
  """
  key_of_tests, key_of_next = jax.random.split(key)
  places = jnp.arange(len(drafted))
  chance = jax.random.uniform(key_of_tests, drafted.shape, q.dtype)
  passes = chance * q[places, drafted] < p[places, drafted]
  num_kept = jnp.sum(jnp.cumprod(passes.astype(jnp.int32)))
  p_here = p[num_kept]
  rest = jnp.maximum(p_here - jnp.pad(q, ((0, 1), (0, 0)))[num_kept], 0.0)
  rest = jnp.where(jnp.sum(rest) > 0, rest, p_here)  # Rounding alone can leave nothing.
  return num_kept, jax.random.categorical(key_of_next, jnp.log(rest)).astype(jnp.int32)


@jax.jit
def _log_probs(logits_BxNxV, tokens_BxN, sampling):
  """The log-probability of each token at temperature 1, among the ids of the tokenizer."""
  within = jax.vmap(jax.vmap(within_vocabulary, in_axes=(0, None)), in_axes=(0, None))
  log_p = jax.nn.log_softmax(within(logits_BxNxV, sampling.vocab_size), axis=-1)
  return jnp.take_along_axis(log_p, tokens_BxN[..., None], axis=-1)[..., 0]
