"""The growth chains are those of the paper and of the released code, and seeds at once are runs of their own."""

import importlib
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import tokenformer_jax as tf
from tests import small_run
from tests.small_run import MODEL
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data import Batch
from tokenformer_jax.data.image_sources import ImageSource
from tokenformer_jax.training.program import make_program

CHAINS = {"paper": [123_569_664, 354_190_848, 753_796_608, 1_309_705_728], "released": [353_503_232, 756_156_416]}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_grow_through_the_published_sizes(chain):
  config = Config.from_dict(importlib.import_module("experiments.paper_chain").get_config(chain))
  steps = [0, *(stage.step for stage in config.growth.stages)]
  assert [config.model_at(step).num_parameters for step in steps] == CHAINS[chain]
  assert config.training.num_steps > steps[-1] + config.optimizer.decay_steps


def test_architectures_are_compared_at_equal_parameters(monkeypatch):
  monkeypatch.setenv("TOKENFORMER_DATA", "data")
  experiment = importlib.import_module("experiments.architectures")
  for name in ("tokenformer", "transformer", "gpt2", "sas-p", "sas-p/pattention", "tokenformer-groups"):
    config = Config.from_dict(experiment.get_config(name))
    assert abs(config.model.num_non_embedding_parameters / 589_824 - 1) < 0.01, name
    same_flops = experiment.steps_at_equal_flops(name) == experiment.NUM_STEPS
    assert same_flops == (name != "tokenformer-groups"), name
  with pytest.raises(ValueError, match="model preset 'sass' is unknown: .* Did you mean 'sas'"):
    experiment.get_config("sass")


def test_an_unknown_chain_is_refused():
  with pytest.raises(ValueError, match="chain 'paperr' is unknown: choose one of paper, released"):
    importlib.import_module("experiments.paper_chain").get_config("paperr")


def test_the_protocols_sizes_and_stages_are_the_papers(tmp_path, monkeypatch):
  paper_protocol = importlib.import_module("experiments.paper_protocol")
  monkeypatch.setenv("TOKENFORMER_DATA", str(tmp_path))
  for smallest, rows, unit, _ in paper_protocol.PRESETS.values():
    protocol = paper_protocol.Protocol(tmp_path, smallest, rows, unit, 1, 1e-3)
    legs = {leg.name: leg for leg in protocol.legs}
    assert all(leg.after is None or list(legs).index(leg.after) < list(legs).index(leg.name) for leg in protocol.legs)
    units = {}
    for growth, names in {
      "live": ["live 0", "live 1", "live 2", "live 3"], "net2net": [f"net2net trunk {i}" for i in range(3)] + ["net2net 3"],
    }.items():  # fmt: skip
      sizes = [protocol.model(legs[name]).num_non_embedding_parameters for name in names]
      assert [size / sizes[0] for size in sizes] == pytest.approx(
        [1, 2.9, 6.1, 10.6], rel={"live": 0.01, "net2net": 0.25}[growth]
      )
      units[growth] = [protocol.unit_flops(legs[name]) for name in names]
    dense = [protocol.model(legs[f"net2net fork {size}"]).ffn_tokens for size in range(4)]
    assert all(larger % smaller == 0 for smaller, larger in itertools.pairwise(dense))
    largest = protocol.model(legs["scratch 3"]).num_non_embedding_parameters
    assert 300 * unit * rows * 128 >= 200 * largest
    for chain, growth in {"live 3": "live", "released 3": "live", "net2net 3": "net2net"}.items():
      assert legs[chain].stop == 150
      assert protocol.path_flops(legs[chain]) == pytest.approx(60 * units[growth][0] + 30 * sum(units[growth][1:]))
    assert protocol.path_flops(legs["scratch 3"]) == pytest.approx(300 * units["live"][3])
    for name, chain in {"equal": "live 3", "longer": "live 3", "net2net equal": "net2net 3"}.items():
      assert protocol.path_flops(legs[name]) == pytest.approx(protocol.path_flops(legs[chain]), rel=0.02)


def test_seeds_at_once_are_trained_as_each_is_alone(tmp_path):
  at_once = importlib.import_module("experiments.seeds_at_once")
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(f"text:{tmp_path}/text.txt", seed=1)
  config = small_run.replace(config, data=dict(held_out_source=config.data.source))
  text = at_once.Text(config.data, MODEL.seq_length, 1)
  runs = at_once.Runs(config, MODEL, text, (0, 1), 2)
  states = runs.updated(runs.initial_states(), 3)
  program = make_program(config, MODEL, small_run.mesh())
  state = program.initial_state()
  for rows in text.rows((1,), 3, 5)[:, 0]:
    ids = np.asarray(text.windows)[rows].astype(np.int32)
    state, _ = program.train_step(state, Batch(ids[:, :-1], ids[:, 1:]))
  small_run.assert_close(jax.tree.map(lambda leaf: leaf[1], states.params), state.params, 1e-5)


def test_the_picture_of_routing_shows_where_the_model_sends_each_token(tmp_path):
  routing = importlib.import_module("experiments.routing")
  sizes = dict(vocab_size=32, num_layers=2, hidden_size=16, num_heads=2, ffn_tokens=8, seq_length=16)
  mixtures = dict(ffn=dict(experts=3), depth=dict(capacity=0.5, causal="auxiliary"))
  model = tf.LanguageModel(ModelConfig.named("tiny", "mode-staged", **sizes, **mixtures), rngs=nnx.Rngs(0))
  ids = np.arange(12, dtype=np.int32)
  everywhere, some = routing.routes_of(model, ids)
  assert (everywhere.layer, some.layer, some.entries) == (0, 1, 3) and everywhere.goes.all()
  assert everywhere.chosen.shape == some.chosen.shape == (12, 2) and 0 < some.goes.sum() < 12
  np.testing.assert_array_equal(some.chosen[:, 0] >= 0, some.goes)
  texts = ["<b>", "\n", " word", *"abcdefghi"]
  picture = routing.draw([everywhere, some], texts, tmp_path / "routing.png", width=8)
  page = routing.write_html([everywhere, some], texts, tmp_path / "routing.html").read_text()
  assert picture.read_bytes()[:4] == b"\x89PNG" and page.count("<span") == 12 and "&lt;b&gt;" in page
  for index in np.flatnonzero(~some.goes)[:1]:
    assert "layer 1: by" in page.split("<span")[index + 1]
  plain = nnx.eval_shape(lambda: tf.LanguageModel(ModelConfig.named("tiny", **sizes), rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="the model has no router"):
    routing.routes_of(plain, ids)


def test_captions_of_the_image_text_experiment_have_their_labels_and_depend_on_the_step_alone():
  experiment = importlib.import_module("experiments.image_text")
  names = ("dress", "t-shirt", "hat")
  pixels = np.arange(12 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(12, 16, 16, 3)
  source = ImageSource("", 12, lambda index: (Image.fromarray(pixels[index]), index % 3), str, names, 3, {})
  pairs, again = experiment.Pairs(source), experiment.Pairs(source)
  first, same, next_one = pairs.batch(0, 7, 8), again.batch(0, 7, 8), pairs.batch(0, 8, 8)
  for ours, theirs in zip(first, same):
    np.testing.assert_array_equal(ours, theirs)
  assert np.any(first.images != next_one.images)
  ends = pairs.texts(["x"])[0][0, [0, 2]]
  for label in range(3):
    ids, segments = pairs.texts(
      [template.format(names[label]) for template in experiment.TEMPLATES + experiment.PROMPTS]
    )
    assert np.all(ids[:, 0] == ends[0]) and np.all(np.sum(ids == ends[1], axis=1) == 1) and not np.any(ids == 1)
    np.testing.assert_array_equal(ids != 0, segments == 1)
    word = pairs.texts([names[label]])[0][0, 1]
    assert np.array_equal(np.any(first.tokens == word, axis=1), first.meanings == label)
  assert not set(experiment.TEMPLATES) & set(experiment.PROMPTS)
