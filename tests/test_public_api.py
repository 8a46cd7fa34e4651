"""The public names, and saving and loading a model by them."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests.small_run import MODEL
from tokenformer_jax import data


def test_every_public_name_is_there():
  assert {name for name in tf.__all__ if not hasattr(tf, name)} == set()
  assert set(tf.__all__) <= set(dir(tf))
  assert tf.train.__module__ == "tokenformer_jax.training.loop"
  with pytest.raises(AttributeError, match="has no attribute 'trian'"):
    tf.trian  # noqa: B018


def test_version_is_that_of_the_installed_package():
  assert tf.__version__ == importlib.metadata.version("tokenformer_jax")


@pytest.mark.parametrize("name", ["folder", "file/mine.safetensors"])
def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path, name):
  model, _ = tf.grow(tf.LanguageModel(MODEL, rngs=nnx.Rngs(0)), ffn_tokens=24)
  tokenizer = data.open_tokenizer("bytes")
  exported = tf.save(model, tmp_path / name, tokenizer)
  back = tf.load(str(tmp_path / name))
  assert back.config == model.config
  tokens = jnp.arange(8)[None]
  np.testing.assert_array_equal(back(tokens), model(tokens))
  np.testing.assert_array_equal(tf.load(str(exported.path.parent))(tokens), model(tokens))
  assert tf.load_tokenizer(str(exported.path.parent)).fingerprint == tokenizer.fingerprint
  with pytest.raises(ValueError, match="not overwritten"):
    tf.save(model, tmp_path / name)


def test_a_tokenizer_of_another_model_is_not_saved(tmp_path):
  model = tf.LanguageModel(tf.ModelConfig.named("tiny", vocab_size=200), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="tokenizer with 257 ids, model with vocab_size=200"):
    tf.save(model, tmp_path / "model", data.open_tokenizer("bytes"))
  assert not (tmp_path / "model").exists()
