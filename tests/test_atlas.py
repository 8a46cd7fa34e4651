"""The atlas: what is measured of parameter tokens, and the page that shows it, in a browser."""

import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from tests import oracle, small_run
from tests.small_run import MODEL
from tokenformer_jax import data
from tokenformer_jax.atlas.atlas import atlas
from tokenformer_jax.atlas.observe import observe
from tokenformer_jax.data.corpus import Corpus
from tokenformer_jax.nn.parameters import split

ROWS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (5, 7))
CONTEXTS = 3
TEXT = "The clock struck twelve. " * 20


@pytest.fixture(scope="module")
def model():
  return small_run.drawn_model()


@pytest.fixture(scope="module")
def layers(model):
  births = {f"blocks/attention/{name}": np.arange(8) for name in ("query", "key", "value", "proj")}
  observed = observe(model, ROWS, contexts=CONTEXTS, ids=2, births=births | {"blocks/ffn": np.arange(16)}, batch_size=2)
  return {layer.name: layer for layer in observed}


def test_every_layer_is_observed(layers):
  names = ["attention/key", "attention/proj", "attention/query", "attention/value", "ffn"]
  assert list(layers) == [f"{block} {name}" for block in (0, 1) for name in names]
  assert layers["1 ffn"].born.tolist() == list(range(16))


def test_contexts_are_the_strongest_position_of_each_row(model, layers):
  # The first thing a block computes is q of its normalised input.
  query = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[0], split(model)[1]["blocks"]["attention"]["query"])
  x = oracle.layer_norm(np.asarray(model.embedding[...], np.float64)[ROWS.ravel()])
  weights = oracle.weights(x @ query["keys"].T, "l2_norm_gelu", float(model.blocks.attention.query.tau[...][0]))
  layer = layers["0 attention/query"]
  np.testing.assert_allclose(
    layer.use, np.abs(weights).mean(axis=0) * np.linalg.norm(query["values"], axis=1), rtol=1e-5
  )
  for token in range(8):
    of_rows = np.abs(weights[:, token]).reshape(ROWS.shape)
    rows = np.argsort(-of_rows.max(axis=1))[:CONTEXTS]
    places = rows * ROWS.shape[1] + of_rows[rows].argmax(axis=1)
    assert layer.places[token].tolist() == places.tolist()
    np.testing.assert_allclose(layer.weights[token], weights[places, token], rtol=1e-4)


def test_values_raise_and_lower_logits(model, layers):
  table = np.asarray(model.table(), np.float64)
  values = np.asarray(model.blocks.ffn.values[...], np.float64)[1]
  logits = (values - values.mean(axis=1, keepdims=True)) * np.asarray(model.final_norm.scale[...]) @ table.T
  assert layers["1 ffn"].raised.tolist() == np.argsort(-logits, axis=1)[:, :2].tolist()
  assert layers["1 ffn"].lowered.tolist() == np.argsort(logits, axis=1)[:, :2].tolist()
  assert layers["1 attention/query"].raised is None


def test_neighbours_have_the_largest_cosine(model, layers):
  keys = np.asarray(model.blocks.ffn.keys[...], np.float64)[0]
  cosines = keys @ keys.T / np.outer(np.linalg.norm(keys, axis=1), np.linalg.norm(keys, axis=1))
  order = np.argsort(-cosines, axis=1)
  assert order[:, 0].tolist() == list(range(16))
  assert layers["0 ffn"].neighbours.tolist() == order[:, 1:4].tolist()


def page_of(model, **options) -> str:
  tokenizer = data.open_tokenizer("bytes")
  ids = np.asarray(tokenizer.encode(TEXT), np.uint16)
  corpus = Corpus(ids, np.array([len(ids)]), np.zeros(1, np.uint64), {}, "the text")
  return atlas(model, tokenizer, corpus, title="A <small> model", **{"sequences": 8, "seq_length": 16} | options)


def test_the_page_works_in_a_browser(model, tmp_path):
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if browser is None:
    pytest.skip("neither chromium nor google-chrome is installed.")
  (tmp_path / "atlas.html").write_text(page_of(model), encoding="utf-8")

  def visit(address: str) -> tuple[str, str]:
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=20000 --dump-dom"
    command = [browser, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr

  everything, log = visit("atlas.html#layer=1+ffn")
  assert 'data-ready="yes"' in everything and "CONSOLE" not in log
  assert "A &lt;small&gt; model" in everything and "16 tokens." in everything and "Its value raises" in everything
  found, log = visit("atlas.html#layer=1+ffn&search=clock")
  contexts = re.findall(r'<span class="context">(.*?)</span>', found.partition('id="count"')[0], re.S)
  assert contexts and len(contexts) <= 16 and "CONSOLE" not in log
  nothing, _ = visit("atlas.html#search=zebra&everywhere=1")
  assert 'id="count">0 tokens.' in nothing


@pytest.mark.parametrize(
  "options, expected",
  [
    (dict(seq_length=99), "seq_length=99: choose 1 … 16"),
    (dict(sequences=0), "sequences=0: must be at least 1"),
  ],
)
def test_bad_options_are_refused(model, options, expected):
  with pytest.raises(ValueError, match=expected):
    page_of(model, **options)


def test_ids_outside_the_vocabulary_are_refused(model):
  with pytest.raises(ValueError, match="ids from 0 to 264; expected 0 to 263"):
    observe(model, np.array([[0, 264]]))
