"""Speculative decoding draws from the large model's distribution, whatever the small one drafts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.inference.sampling import Sampling
from tokenformer_jax.inference.speculative import accept, speculate
from tokenformer_jax.models.language_model import LanguageModel

CONFIG = ModelConfig(
  vocab_size=264, num_layers=1, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=16, seq_length=48
)
SMALL = dataclasses.replace(CONFIG, vocab_size=8, seq_length=16)


def made(config, seed, noise=0.0):
  """A model whose texts vary; `noise` changes it a little."""
  model = LanguageModel(config, rngs=nnx.Rngs(seed))
  model.blocks = jax.tree.map(lambda x: 8.0 * x if x.ndim == 3 else x, model.blocks)
  other = np.random.default_rng(1).normal(size=model.embedding[...].shape).astype(np.float32)
  model.embedding[...] = 20.0 * model.embedding[...] + noise * other
  return model


@pytest.fixture(scope="module")
def model():
  return made(CONFIG, 0)


def test_kept_and_new_tokens_have_the_large_models_probabilities():
  p = np.array([[0.1, 0.2, 0.3, 0.4, 0.0], [0.5, 0.1, 0.1, 0.1, 0.2], [0.05, 0.05, 0.1, 0.1, 0.7]], np.float32)
  q = np.array([[0.4, 0.1, 0.0, 0.2, 0.3], [0.5, 0.1, 0.1, 0.1, 0.2]], np.float32)

  @jax.jit
  @jax.vmap
  def drawn(key):
    key, key_of_draft = jax.random.split(key)
    drafted = jax.random.categorical(key_of_draft, jnp.log(q), axis=1)
    num_kept, following = accept(jnp.asarray(p), jnp.asarray(q), drafted, key)
    return num_kept, jnp.append(drafted, 0).at[num_kept].set(following)

  num_kept, tokens = map(np.asarray, drawn(jax.random.split(jax.random.key(0), 20_000)))
  assert abs(np.mean(num_kept > 0) - 0.4) < 0.015  # Σ min(p, q)
  for place in range(3):
    counts = np.bincount(tokens[num_kept >= place, place], minlength=5)
    possible = p[place] > 0
    assert counts[~possible].sum() == 0
    expected = p[place][possible] * counts.sum()
    assert np.sum((counts[possible] - expected) ** 2 / expected) < 18.5, place  # 99.9 % with 4 degrees of freedom.


def test_drawn_texts_have_the_large_models_distribution():
  """The second and third new token, over many texts, against all continuations of the prompt."""
  model, draft, num_ids, prompt = made(SMALL, 0), made(SMALL, 0, noise=0.15), 6, [1, 2, 3]
  prefixes = [[*prompt, a, b] for a in range(num_ids) for b in range(num_ids)]
  p = np.asarray(jax.nn.softmax(jax.jit(model)(np.array(prefixes))[..., :num_ids] / 1.5, axis=-1), np.float64)
  first, second, third = p[0, 2], p[::num_ids, 3], p[:, 4].reshape(num_ids, num_ids, num_ids)
  expected = np.einsum("a,ab,abc->bc", first, second, third)
  counts, rounds = np.zeros((num_ids, num_ids)), 0
  for seed in range(50):
    sampling = Sampling.checked(vocab_size=num_ids, temperature=1.5, seed=seed)
    asked = []
    steps = speculate(model, draft, 12 * [prompt], 3, sampling, 2, lambda asked=asked: asked.append(1) or 12 * [False])
    _, b, c = (tokens for tokens, _ in steps)
    np.add.at(counts, (b, c), 1)
    rounds += len(asked)
  assert 50 < rounds < 100  # Some drafts were kept, some were not.
  assert np.sum((counts - 600 * expected) ** 2 / (600 * expected)) < 66.6  # 99.9 % with 35 degrees of freedom.


def test_the_likeliest_text_is_that_of_the_large_model(model):
  prompts = ["abc", "a longer prompt", ""]
  settings = dict(max_new_tokens=20, temperature=0, return_log_probs=True)
  expected = generate(model, ByteTokenizer(), prompts, **settings)
  results = generate(model, ByteTokenizer(), prompts, **settings, draft=made(CONFIG, 0, noise=0.02), draft_tokens=3)
  assert [result.ids for result in results] == [result.ids for result in expected]
  for result, other in zip(results, expected):
    np.testing.assert_allclose(result.log_probs, other.log_probs, atol=1e-4)


def test_a_draft_that_is_right_is_kept_as_a_whole(model):
  asked = []
  sampling = Sampling.checked(vocab_size=257, temperature=1.0)
  steps = speculate(model, model, [[1, 2], [3], [4]], 20, sampling, 3, lambda: asked.append(1) or 3 * [False])
  assert len(list(steps)) == 20 and len(asked) == 5


@pytest.mark.parametrize(
  "change, settings, message",
  [
    (dict(vocab_size=256), {}, "the draft model has vocab_size=256 and the tokenizer 257 ids"),
    (dict(seq_length=16), {}, r"prompt 0 has 1 tokens and max_new_tokens=20: together they may be 16"),
    ({}, dict(repetition_penalty=1.2), "repetition_penalty=1.2 with a draft"),
    ({}, dict(draft_tokens=0), "draft_tokens=0: must be at least 1"),
  ],
)
def test_a_draft_that_does_not_fit_is_refused(model, change, settings, message):
  draft = nnx.eval_shape(lambda: LanguageModel(dataclasses.replace(CONFIG, **change), rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match=message):
    generate(model, ByteTokenizer(), "a", max_new_tokens=20, draft=draft, **settings)


def test_a_cache_that_cannot_be_shortened_is_refused(model):
  draft = nnx.eval_shape(lambda: LanguageModel(ModelConfig.named("tiny", "sas"), rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="the draft model has attention.shaped='centred', whose cache cannot take back"):
    generate(model, ByteTokenizer(), "a", max_new_tokens=2, draft=draft)
