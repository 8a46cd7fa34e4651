"""Shrinking: the least used go first, growth is undone to the bit, and the report says what it costs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import oracle, small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax import data
from tokenformer_jax.config import GrowthConfig
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.layers import leaves_by_path
from tokenformer_jax.growth.plan import counts_of, layers_of
from tokenformer_jax.growth.shrink import Kept, most_used, shrink_tree
from tokenformer_jax.growth.usage import Usage, tau_factor, token_usage
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resize import grow_run, shrink_run
from tokenformer_jax.training.resume import stored_config

BATCHES = [np.random.default_rng(seed).integers(0, MODEL.vocab_size, (2, 13)) for seed in range(2)]
BACK = {field: getattr(MODEL, field) for field in ("qkv_tokens", "proj_tokens", "ffn_tokens")}


@pytest.fixture(scope="module")
def model():
  return small_run.drawn_model()


@pytest.fixture(scope="module")
def usage(model):
  return token_usage(model, BATCHES)


def test_use_is_the_mean_absolute_contribution(model, usage):
  # The first thing a block computes is q of its normalised input.
  query = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[0], split(model)[1]["blocks"]["attention"]["query"])
  tau = float(model.blocks.attention.query.tau[...][0])
  ids = np.concatenate([batch[:, :-1].ravel() for batch in BATCHES])
  x = oracle.layer_norm(np.asarray(model.embedding[...], np.float64)[ids])
  weights = oracle.weights(x @ query["keys"].T, "l2_norm_gelu", tau)
  contributions = [np.abs(weight) * np.linalg.norm(value) for weight, value in zip(weights.T, query["values"])]
  np.testing.assert_allclose(usage["blocks/attention/query"].use[0], np.mean(contributions, axis=1), rtol=1e-5)
  assert {path: one.use.shape for path, one in usage.items()} == {
    **{f"blocks/attention/{name}": (2, 8) for name in ("query", "key", "value", "proj")},
    "blocks/ffn": (2, 16),
  }


def test_use_is_the_mean_over_positions_however_they_are_batched(model, usage):
  together = token_usage(model, [np.concatenate(BATCHES)])
  for path in usage:
    np.testing.assert_allclose(together[path].use, usage[path].use, rtol=1e-5)
    np.testing.assert_allclose(together[path].mass, usage[path].mass, rtol=1e-5)


def test_padding_is_no_use(model, usage):
  ids = np.concatenate([np.stack([batch[:, :-1] for batch in BATCHES]).reshape(4, 12), np.full((4, 4), 7)], axis=1)
  segments = np.repeat(np.array([[1] * 12 + [0] * 4]), 4, axis=0)
  positions = np.repeat(np.array([[*range(12), 0, 0, 0, 0]]), 4, axis=0)
  padded = data.Batch(ids, ids, positions, segments, (segments > 0).astype(np.float32))
  for path, one in token_usage(model, [padded]).items():
    np.testing.assert_allclose(one.use, usage[path].use, rtol=1e-5)


def test_the_least_used_of_each_layer_go_and_the_others_keep_their_order(model, usage):
  smaller, report = tf.shrink(model, BATCHES, qkv_tokens=5, ffn_tokens=9)
  assert smaller.config == MODEL.grown(qkv_tokens=5, ffn_tokens=9)
  for layer in range(2):
    use = usage["blocks/ffn"].use[layer]
    stay = use > np.sort(use)[6]
    for leaf in ("keys", "values"):
      np.testing.assert_array_equal(
        getattr(smaller.blocks.ffn, leaf)[...][layer], getattr(model.blocks.ffn, leaf)[...][layer][stay]
      )
  assert report.tokens["blocks/attention/proj"] == (8, 8, 0.0)
  shares = [1 - np.sort(one.use)[:, 3:].sum() / one.use.sum() for path, one in usage.items() if path.endswith("key")]
  assert report.tokens["blocks/attention/key"] == (8, 5, pytest.approx(shares[0]))


def test_the_reported_losses_are_those_of_the_two_models(model):
  held_out = [np.random.default_rng(9).integers(0, MODEL.vocab_size, (3, 9))]
  smaller, report = tf.shrink(model, BATCHES, held_out, proj_tokens=4)
  for loss, of in zip(report.losses, (model, smaller)):
    graphdef, *weights = split(of)
    logits = jax.jit(lambda weights: nnx.merge(graphdef, *weights)(held_out[0][:, :-1]))(weights)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nats = -np.take_along_axis(log_p, held_out[0][:, 1:, None], -1)
    assert loss == pytest.approx(nats.mean(), rel=1e-5)
  assert report.losses[0] != report.losses[1]
  assert f"parameters: {MODEL.num_parameters:,} -> {smaller.config.num_parameters:,}" in str(report)


def test_of_tokens_used_alike_the_newest_go_first():
  use = np.array([[0.0, 2.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
  layers = layers_of(MODEL.grown(ffn_tokens=5))
  kept = most_used({"blocks/ffn": Usage(use, np.ones_like(use))}, layers, {"blocks/ffn": 3})
  assert kept["blocks/ffn"].rows.tolist() == [[0, 1, 3], [0, 1, 2]]


def test_births_that_differ_between_layers_become_the_latest():
  kept = {"blocks/ffn": Kept(np.array([[0, 1], [0, 2]]), np.ones(2))}
  born = shrink_tree({"born": {"blocks": {"ffn": {"keys": jnp.array([0, 5, 7])}}}}, kept)
  assert leaves_by_path(born)["born/blocks/ffn/keys"].tolist() == [0, 7]


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm"])
def test_untrained_growth_is_undone_to_the_bit(theta):
  config = dataclasses.replace(MODEL, theta=theta)
  run = small_run.replace(small_run.config(), model=dict(theta=theta))
  state = small_run.noise(make_program(run, config, small_run.mesh()).shapes)
  grown, *_ = grow_state(state, config, dataclasses.replace(GROWN, theta=theta), GrowthConfig(method="exact"))
  graphdef, *_ = split(
    nnx.eval_shape(lambda: tf.LanguageModel(dataclasses.replace(GROWN, theta=theta), rngs=nnx.Rngs(0)))
  )
  layers = layers_of(dataclasses.replace(GROWN, theta=theta))
  usage = token_usage(nnx.merge(graphdef, grown.params, grown.tau), BATCHES)
  kept = most_used(usage, layers, counts_of(layers, config))
  small_run.assert_same(shrink_tree(grown, kept), state)


def test_what_an_optimizer_keeps_of_tau_stays():
  kept = {"blocks/ffn": Kept(np.array([[0, 1], [0, 2]]), np.array([0.5, 0.25]))}
  tau = jnp.array([4.0, 4.0])
  state = {"tau": {"blocks": {"ffn": {"tau": tau}}}, "tau_opt_state": {"mu": {"blocks": {"ffn": {"tau": tau}}}}}
  shrunk = leaves_by_path(shrink_tree(state, kept))
  assert shrunk["tau/blocks/ffn/tau"].tolist() == [2.0, 1.0]
  assert shrunk["tau_opt_state/mu/blocks/ffn/tau"].tolist() == [4.0, 4.0]


def test_a_layer_whose_scores_are_all_zero_keeps_its_tau():
  layer = layers_of(MODEL)["blocks/ffn"]
  assert tau_factor(layer, np.zeros((2, 16)), np.zeros((2, 4), int)).tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_a_grown_work_folder_is_shrunk_back_to_what_it_was(tmp_path):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.replace(small_run.config(f"text:{tmp_path}/text.txt"), growth=dict(method="exact"))
  shapes = make_program(config, MODEL, small_run.mesh()).shapes
  state = dataclasses.replace(small_run.noise(shapes), step=jnp.int32(6))
  tokenizer = data.open_tokenizer("bytes")
  checkpoints = Checkpoints(str(tmp_path / "run"))
  checkpoints.save(
    6,
    state,
    {
      "model": dataclasses.asdict(MODEL),
      "config": config.to_dict(),
      "data": {"next_batch": 7},
      "fingerprint": {},
      "tokenizer": tokenizer.fingerprint,
    },
  )
  checkpoints.close()
  (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
  data.save_tokenizer(tokenizer, tmp_path / "run" / "tokenizer.json")
  grow_run(str(tmp_path / "run"), str(tmp_path / "grown"), qkv_tokens=16, proj_tokens=24, ffn_tokens=32)
  before = small_run.folder_digest(tmp_path / "grown")
  report = shrink_run(str(tmp_path / "grown"), str(tmp_path / "back"), **BACK)
  assert report.num_parameters == (GROWN.num_parameters, MODEL.num_parameters)
  assert report.losses[0] == pytest.approx(report.losses[1], rel=1e-6)
  back = Checkpoints(str(tmp_path / "back"))
  small_run.assert_same(back.restore(6, shapes), state)
  old = Checkpoints(str(tmp_path / "run")).record(6)
  assert back.record(6) == {**old, "losses": []} and stored_config(str(tmp_path / "back")) == config
  assert small_run.folder_digest(tmp_path / "grown") == before
  with pytest.raises(ValueError, match="shrinking changes nothing"):
    shrink_run(str(tmp_path / "grown"), str(tmp_path / "none"))
  with pytest.raises(ValueError, match="ffn_tokens: 32 -> 33: shrinking cannot add rows; choose at most 32"):
    shrink_run(str(tmp_path / "grown"), str(tmp_path / "none"), ffn_tokens=33)
  assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize(
  "batches, counts, message",
  [
    (BATCHES, dict(), "shrinking changes nothing: qkv_tokens=8, proj_tokens=8, ffn_tokens=16"),
    (BATCHES, dict(qkv_tokens=9, ffn_tokens=8), "qkv_tokens: 8 -> 9: shrinking cannot add rows"),
    (BATCHES, dict(ffn_tokens=0), "ffn_tokens=0: must be a whole number of at least 1"),
    ([], dict(ffn_tokens=8), "batches: there are none"),
    ([np.zeros((2, 1), np.int32)], dict(ffn_tokens=8), r"batch \(2, 1\): expected token ids \[B, T\]"),
    ([np.full((2, 4), 264)], dict(ffn_tokens=8), "ids from 264 to 264; expected 0 to 263"),
  ],
)
def test_what_cannot_be_shrunk_is_refused(model, batches, counts, message):
  with pytest.raises(ValueError, match=message):
    tf.shrink(model, batches, **counts)


def test_a_broken_model_is_refused(model):
  graphdef, params, tau = split(model)
  params = {**params, "embedding": params["embedding"] * np.nan}
  with pytest.raises(ValueError, match="blocks/.*: its use on this data is not finite"):
    tf.shrink(nnx.merge(graphdef, params, tau), BATCHES, ffn_tokens=8)
