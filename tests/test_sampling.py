"""Sampling against a plain NumPy definition of what each setting keeps, and against the probabilities of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenformer_jax.inference.sampling import (
  NO_TOKEN,
  Sampling,
  greedy,
  log_probs,
  penalise,
  sample,
  truncate,
  within_vocabulary,
)

_sample = jax.jit(sample)
_truncate = jax.jit(jax.vmap(truncate, in_axes=(0, None, None)))


def kept_by_definition(logits, top_k, top_p):
  """The set of ids that may be drawn, collected from the likeliest id on."""
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  if top_k:
    order = order[:top_k]
  weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
  weights /= weights.sum()
  kept, mass = set(), 0.0
  for token, weight in zip(order, weights):
    kept.add(token)
    mass += weight
    if mass >= top_p:
      break
  return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_truncation_equals_its_definition(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2
  cut = np.asarray(_truncate(logits, jnp.int32(top_k), jnp.float32(top_p)))
  for row, cut_row in zip(logits, cut):
    kept = set(np.flatnonzero(np.isfinite(cut_row)).tolist())
    assert kept == kept_by_definition(row.tolist(), top_k, top_p)
    np.testing.assert_array_equal(cut_row[list(kept)], row[list(kept)])


def test_top_p_of_one_keeps_even_ids_that_rounding_would_lose():
  logits = jnp.array([[0.0, -30.0, -31.0]])
  assert np.isfinite(_truncate(logits, jnp.int32(0), jnp.float32(1.0))).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_neighbours_in_float32_are_distinguished(sign):
  first = np.float32(sign)
  logits = np.array([first, np.nextafter(first, np.float32(9)), np.nextafter(first, np.float32(-9)), 0, -np.inf])
  logits = logits[None].astype(np.float32)
  for top_k in range(1, 5):
    kept = np.isfinite(_truncate(logits, jnp.int32(top_k), jnp.float32(1.0)))[0]
    assert set(np.flatnonzero(kept).tolist()) == kept_by_definition(logits[0].tolist(), top_k, 1.0), top_k


def test_equal_logits_are_kept_together():
  logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
  for top_k, top_p in ((1, 1.0), (0, 0.1)):
    kept = np.isfinite(_truncate(logits, jnp.int32(top_k), jnp.float32(top_p)))
    assert kept.tolist() == [[False, True, True, False]]


def draw(logits, count=4000, **settings):
  sampling = Sampling.checked(vocab_size=logits.shape[-1], **settings)
  return np.asarray(_sample(jnp.broadcast_to(logits, (count, logits.shape[-1])), sampling, jnp.int32(0)))


def assert_frequencies(drawn, expected):
  frequencies = np.bincount(drawn, minlength=len(expected)) / len(drawn)
  # The tolerance is five standard deviations.
  np.testing.assert_array_less(np.abs(frequencies - expected), 5 * np.sqrt(expected * (1 - expected) / len(drawn)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature):
  logits = jnp.array([2.0, 1.0, 0.0, -1.0])
  expected = np.exp(np.asarray(logits, np.float64) / temperature)
  assert_frequencies(draw(logits, temperature=temperature), expected / expected.sum())


def test_a_large_vocabulary_is_drawn_from_evenly():
  # The vocabulary has several blocks and a last one that is not full. It is compared in 30 groups of neighbouring ids,
  # whose logits rise from group to group, and in 20 groups of ids with equal remainders.
  logits = np.random.default_rng(0).normal(size=600) + np.linspace(-1, 1, 600)
  expected = np.exp(logits) / np.exp(logits).sum()
  drawn = draw(jnp.asarray(logits, jnp.float32), count=20000)
  assert_frequencies(drawn // 20, expected.reshape(30, 20).sum(axis=1))
  assert_frequencies(drawn % 20, expected.reshape(30, 20).sum(axis=0))


def test_temperature_zero_is_greedy_and_so_is_its_limit():
  logits = jnp.array([0.0, 30.0, 30.1])
  assert greedy(logits) == 2
  assert greedy(jnp.array([5.0, 5.0, -1.0])) == 0
  for temperature in (0.0, 1e-3, 1.2e-38):
    drawn = draw(logits, count=50, temperature=temperature)
    assert set(drawn.tolist()) == {2}, temperature


def test_the_order_is_temperature_then_top_k_then_top_p():
  # At T = 1 the likeliest id has 0.73 of the probability of the top two. At T = 10 it has 0.52, so that top_p = 0.6
  # needs the second id too.
  logits = jnp.array([1.0, 0.0, -0.5, -0.5, -0.5])
  assert set(draw(logits, top_k=2, top_p=0.6).tolist()) == {0}
  assert set(draw(logits, top_k=2, top_p=0.6, temperature=10.0).tolist()) == {0, 1}


@pytest.mark.parametrize(
  "settings",
  [
    dict(temperature=0.0),
    dict(temperature=100.0),
    dict(temperature=100.0, top_k=9),
    dict(temperature=100.0, top_p=0.999),
  ],
)
def test_padding_ids_are_never_drawn(settings):
  logits = jnp.zeros((2000, 12)).at[:, 7:].set(20.0)
  sampling = Sampling.checked(vocab_size=7, **settings)
  assert int(jnp.max(_sample(logits, sampling, jnp.int32(0)))) < 7
  assert np.isneginf(within_vocabulary(logits[0], jnp.int32(7))[7:]).all()


def test_a_draw_depends_only_on_seed_row_and_index():
  logits = jax.random.normal(jax.random.key(0), (1, 300))
  four = jnp.tile(logits, (4, 1))
  sampling = Sampling.checked(vocab_size=300, seed=5)
  drawn = _sample(four, sampling, jnp.int32(3))
  assert _sample(logits, sampling, jnp.int32(3))[0] == drawn[0]
  assert len(set(drawn.tolist())) > 1
  assert _sample(four, sampling, jnp.int32(4)).tolist() != drawn.tolist()
  assert _sample(four, Sampling.checked(vocab_size=300, seed=6), jnp.int32(3)).tolist() != drawn.tolist()
  # A setting that cuts nothing changes nothing.
  wide = Sampling.checked(vocab_size=300, seed=5, top_k=300)
  assert _sample(four, wide, jnp.int32(3)).tolist() == drawn.tolist()


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(temperature=-0.1), "temperature=-0.1"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(top_p=float("nan")), "top_p=nan"),
    (dict(top_k=-1), "top_k=-1"),
    (dict(top_k=2.5), "top_k=2.5"),
    (dict(seed=-1), "seed=-1"),
    (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
    (dict(repetition_penalty=float("nan")), "repetition_penalty=nan"),
    (dict(vocab_size=0), "vocab_size=0"),
  ],
)
def test_a_value_out_of_range_is_named(settings, message):
  with pytest.raises(ValueError, match=f"^{message}: must be"):
    Sampling.checked(**{"vocab_size": 10, **settings})


def test_every_seed_has_a_key_of_its_own():
  def key(seed):
    return jax.random.key_data(Sampling.checked(vocab_size=9, seed=seed).key).tolist()

  seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**64, 2**64 + 2**32, 10**40, np.uint64(2**63)]
  assert len({tuple(key(seed)) for seed in seeds}) == len(seeds)
  assert key(2**32 - 1) == jax.random.key_data(jax.random.key(2**32 - 1)).tolist()
  assert key(10**40) == key(10**40)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_its_definition(penalty):
  """As in Hugging Face's library: score / penalty, or score · penalty for a negative score, for ids read before."""
  logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
  read = np.array([[3, 3, NO_TOKEN, 39], [0, 5, 7, 9], [NO_TOKEN] * 4], np.int32)
  expected, seen = logits.copy(), np.zeros(logits.shape, bool)
  for row, ids in enumerate(read):
    for i in {i for i in ids if i != NO_TOKEN}:
      seen[row, i] = True
      expected[row, i] *= np.float32(penalty) if logits[row, i] < 0 else 1 / np.float32(penalty)
  assert (logits[seen] < 0).any() and (logits[seen] > 0).any()
  np.testing.assert_allclose(jax.vmap(penalise, (0, 0, None))(logits, seen, jnp.float32(penalty)), expected, rtol=1e-6)
  # A draw applies it before the temperature and the cuts.
  settings = dict(vocab_size=40, temperature=2.0, top_k=12, seed=1)
  penalised, neutral = Sampling.checked(**settings, repetition_penalty=penalty), Sampling.checked(**settings)
  for index in range(20):
    drawn = _sample(logits, penalised, jnp.int32(index), read)
    np.testing.assert_array_equal(drawn, _sample(expected, neutral, jnp.int32(index), read))


def test_log_probs_are_normalised_over_the_vocabulary():
  logits = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
  logits[:, 7:] = 50.0
  tokens = np.arange(7, dtype=np.int32)
  exps = np.exp(logits[:, :7].astype(np.float64))
  expected = np.log(exps / exps.sum(axis=1, keepdims=True))[tokens, tokens]
  np.testing.assert_allclose(jax.jit(log_probs)(logits, tokens, jnp.int32(7)), expected, atol=1e-5)
