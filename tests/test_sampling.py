"""Sampling against a plain NumPy account of what each setting keeps, and against its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenformer_jax.inference.sampling import Sampling, greedy, sample, truncate, within_vocabulary

_sample = jax.jit(sample)
_truncate = jax.jit(jax.vmap(truncate, in_axes=(0, None, None)))


def kept_by_definition(logits, top_k, top_p):
  """The set of ids that may be drawn, one token after the other from the likeliest."""
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
def test_truncation_keeps_what_the_definition_keeps(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2
  cut = np.asarray(_truncate(logits, jnp.int32(top_k), jnp.float32(top_p)))
  for row, cut_row in zip(logits, cut):
    kept = set(np.flatnonzero(np.isfinite(cut_row)).tolist())
    assert kept == kept_by_definition(row.tolist(), top_k, top_p)
    np.testing.assert_array_equal(cut_row[list(kept)], row[list(kept)])


def test_top_p_one_keeps_also_what_rounding_would_lose():
  logits = jnp.array([[0.0, -30.0, -31.0]])
  assert np.isfinite(_truncate(logits, jnp.int32(0), jnp.float32(1.0))).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_neighbours_in_float32_are_told_apart(sign):
  first = np.float32(sign)
  logits = np.array([first, np.nextafter(first, np.float32(9)), np.nextafter(first, np.float32(-9)), 0, -np.inf])
  logits = logits[None].astype(np.float32)
  for top_k in range(1, 5):
    kept = np.isfinite(_truncate(logits, jnp.int32(top_k), jnp.float32(1.0)))[0]
    assert set(np.flatnonzero(kept).tolist()) == kept_by_definition(logits[0].tolist(), top_k, 1.0), top_k


def test_equals_are_kept_together():
  logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
  for top_k, top_p in ((1, 1.0), (0, 0.1)):
    kept = np.isfinite(_truncate(logits, jnp.int32(top_k), jnp.float32(top_p)))
    assert kept.tolist() == [[False, True, True, False]]


def draw(logits, count=4000, **settings):
  sampling = Sampling.checked(vocab_size=logits.shape[-1], **settings)
  return np.asarray(_sample(jnp.broadcast_to(logits, (count, logits.shape[-1])), sampling, jnp.int32(0)))


def assert_frequencies(drawn, expected):
  frequencies = np.bincount(drawn, minlength=len(expected)) / len(drawn)
  # Five standard deviations.
  np.testing.assert_array_less(np.abs(frequencies - expected), 5 * np.sqrt(expected * (1 - expected) / len(drawn)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature):
  logits = jnp.array([2.0, 1.0, 0.0, -1.0])
  expected = np.exp(np.asarray(logits, np.float64) / temperature)
  assert_frequencies(draw(logits, temperature=temperature), expected / expected.sum())


def test_a_large_vocabulary_is_drawn_from_evenly():
  # Blocks, their insides, and a last one that is not full: 30 groups of ids, whose logits rise from one to the next.
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
  # At T = 1 the likeliest has 0.73 of the top two, at T = 10 only 0.52: top_p = 0.6 needs the second.
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


def test_a_draw_depends_on_seed_row_and_index_only():
  logits = jax.random.normal(jax.random.key(0), (1, 300))
  assert Sampling.checked(vocab_size=9, seed=2**32 - 1).key != Sampling.checked(vocab_size=9, seed=0).key
  four = jnp.tile(logits, (4, 1))
  sampling = Sampling.checked(vocab_size=300, seed=5)
  drawn = _sample(four, sampling, jnp.int32(3))
  assert _sample(logits, sampling, jnp.int32(3))[0] == drawn[0]
  assert len(set(drawn.tolist())) > 1
  assert _sample(four, sampling, jnp.int32(4)).tolist() != drawn.tolist()
  assert _sample(four, Sampling.checked(vocab_size=300, seed=6), jnp.int32(3)).tolist() != drawn.tolist()
  # Settings that cut nothing change nothing.
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
    (dict(seed=2**32), "seed=4294967296"),
    (dict(vocab_size=0), "vocab_size=0"),
  ],
)
def test_a_value_out_of_range_is_named(settings, message):
  with pytest.raises(ValueError, match=f"^{message}: must be"):
    Sampling.checked(**{"vocab_size": 10, **settings})
