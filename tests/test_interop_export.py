"""There and back is bit-exact, a grown model keeps its function, and nothing that is there is lost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests import oracle
from tokenformer_jax.config import Config, MeshConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.pretrained import TAU_KEY, from_pretrained
from tokenformer_jax.interop.weight_config import read_config
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

CONFIG = ModelConfig(
  vocab_size=37,
  num_layers=2,
  hidden_size=16,
  num_heads=2,
  qkv_tokens=9,
  proj_tokens=10,
  ffn_tokens=24,
  seq_length=32,
  rotary_fraction=0.5,
)


@pytest.fixture(scope="module")
def model():
  return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def grown(model):
  """Grown, with keys that are no longer zero, as after training."""
  bigger, _ = grow(model, qkv_tokens=14, proj_tokens=10, ffn_tokens=40)
  graphdef, parameters, tau = split(bigger)
  rng = np.random.default_rng(1)
  parameters = jax.tree.map(lambda leaf: leaf + 0.1 * np.float32(rng.normal(size=leaf.shape)), parameters)
  return nnx.merge(graphdef, parameters, tau)


def leaves(model):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(split(model)[1:])
  }


def assert_equal(model, other):
  assert model.config == other.config
  expected = leaves(other)
  assert leaves(model).keys() == expected.keys()
  for name, leaf in leaves(model).items():
    assert leaf.dtype == expected[name].dtype
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_there_and_back_is_exact(tmp_path, model):
  first = export(model, tmp_path / "a" / "pytorch_model.bin").path
  second = export(from_pretrained(first), tmp_path / "b").path
  third = export(from_pretrained(second.parent), tmp_path / "c" / "pytorch_model.bin").path
  assert second.name == "model.safetensors"
  assert_equal(from_pretrained(second), model)
  assert_equal(from_pretrained(third.parent), model)
  assert first.read_bytes() == third.read_bytes()


def test_bfloat16_is_exact_from_bfloat16_on(tmp_path, model):
  first = export(model, tmp_path / "a" / "x.safetensors", dtype="bfloat16").path
  second = export(from_pretrained(first), tmp_path / "b" / "x.bin", dtype="bfloat16").path
  third = export(from_pretrained(second), tmp_path / "c" / "x.safetensors", dtype="bfloat16").path
  assert first.read_bytes() == third.read_bytes()
  name = "sequential.3.mlp.value_param_tokens"
  stored = safetensors.numpy.load_file(first)[name]
  assert stored.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(stored, np.asarray(model.blocks.ffn.values[1]).astype(ml_dtypes.bfloat16))
  np.testing.assert_array_equal(open_weights(second).arrays[name].read(), stored)


def test_a_grown_model_keeps_its_tau_in_safetensors(tmp_path, grown):
  exported = export(grown, tmp_path / "ours")
  assert exported.keeps_grown_tau and not any(exported.rows_added.values())
  with safetensors.safe_open(exported.path, "numpy") as file:
    tau = json.loads(file.metadata()[TAU_KEY])
  assert tau["sequential.2.attention.key"] == 3.0
  assert tau["sequential.3.mlp"] == float(np.float32(np.sqrt(24)))
  assert_equal(from_pretrained(tmp_path / "ours"), grown)


@pytest.mark.parametrize("name, settings", [("x.bin", {}), ("x.safetensors", dict(released=True))])
def test_a_grown_model_is_itself_in_the_released_form(tmp_path, grown, name, settings):
  exported = export(grown, tmp_path / name, **settings)
  # proj was not grown; k = min(N, d) rows to the others.
  assert exported.rows_added == dict(qkv_tokens=14, proj_tokens=0, ffn_tokens=16)
  assert not exported.keeps_grown_tau
  assert exported.config == CONFIG.grown(qkv_tokens=28, ffn_tokens=56)
  assert exported.config == read_config(tmp_path / "config.json")
  tokens = np.random.default_rng(0).integers(0, 37, (2, 20))
  expected = np.asarray(jax.jit(grown)(jnp.asarray(tokens)))
  again = np.asarray(jax.jit(from_pretrained(tmp_path / name))(jnp.asarray(tokens)))
  weights = open_weights(tmp_path / name)
  arrays = {key: array.read().astype(np.float64) for key, array in weights.arrays.items()}
  scale = np.abs(expected).max()
  assert np.abs(again - expected).max() < 1e-5 * scale
  assert np.abs(oracle.language_model(arrays, tokens, exported.config) - expected).max() < 1e-5 * scale
  assert TAU_KEY not in weights.metadata


def test_sharded_parameters_are_written_whole(tmp_path, model):
  config = dataclasses.replace(CONFIG, vocab_size=40, qkv_tokens=8, proj_tokens=8)
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  whole = export(model, tmp_path / "a" / "x.bin").path
  parts = from_pretrained(whole, mesh=make_mesh(MeshConfig(token=4, fsdp=2)))
  assert export(parts, tmp_path / "b" / "x.bin").path.read_bytes() == whole.read_bytes()


def run_folder(folder):
  """What a training run leaves, as far as an export reads it."""
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(Config(model=CONFIG).to_dict()))
  rows = [{"step": step, "held_out/loss": 9.0 - step} for step in (1, 2, 3)]
  rows.append({"step": 4, "train/loss": 1.0})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "tokenizer.json").write_text('{"kind": "bytes"}')
  return folder


def test_a_card_and_a_configuration_stand_beside_an_export(tmp_path, model, grown):
  run = run_folder(tmp_path / "run")
  export(model, tmp_path / "a", source=run, step=2)
  assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert read_config(tmp_path / "a" / "config.json") == CONFIG
  assert (tmp_path / "a" / "tokenizer.json").read_text() == '{"kind": "bytes"}'
  card = (tmp_path / "a" / "README.md").read_text()
  for part in (
    f"{CONFIG.num_parameters:,} parameters",
    f"Exported from `{run}`, step 2.",
    "| ffn_tokens | 24 |",
    "| source | python-sources |",
    "Held-out loss 7.0000 nats a token after 2 updates.",
    'tf.from_pretrained("model.safetensors")',
    "is in the file's metadata",
  ):
    assert part in card, part
  export(model, tmp_path / "b", source=run)
  assert "Held-out loss 6.0000 nats a token after 3 updates." in (tmp_path / "b" / "README.md").read_text()

  export(grown, tmp_path / "c" / "x.bin", source=tmp_path / "a")
  card = (tmp_path / "c" / "README.md").read_text()
  for part in ("14 to each of qkv_tokens, 16 to each of ffn_tokens", "| qkv_slot_num | 28 |", "| rotary_pct | 0.5 |"):
    assert part in card, part
  assert "Held-out" not in card
  assert (tmp_path / "c" / "tokenizer.json").exists()


@pytest.mark.parametrize("there", ["model.safetensors", "config.json", "README.md", "tokenizer.json"])
def test_nothing_is_overwritten(tmp_path, model, there):
  (tmp_path / there).write_text("mine")
  with pytest.raises(ValueError, match=f"{there}: is there already and is not overwritten"):
    export(model, tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == [there]
  assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("x.pt", {}, "ends in .pt; choose .bin, .safetensors, or a folder"),
    ("x.bin", dict(released=False), "a .bin has no place for τ"),
    ("x.bin", dict(dtype="float16"), "dtype='float16': choose one of float32, bfloat16"),
  ],
)
def test_a_bad_request_is_refused_and_writes_nothing(tmp_path, model, name, settings, message):
  with pytest.raises(ValueError, match=message):
    export(model, tmp_path / "out" / name, **settings)
  assert not (tmp_path / "out").exists()


def test_a_folder_may_have_a_dot_in_its_name(tmp_path, model):
  folder = tmp_path / "tokenformer-1.5b"
  assert export(model, folder).path == folder / "model.safetensors"


def test_a_broken_run_writes_nothing(tmp_path, model):
  run = run_folder(tmp_path / "run")
  for broken, message in (('{"model": 5}', "expected the fields of ModelConfig"), ("{", ": broken")):
    (run / "config.json").write_text(broken)
    with pytest.raises(ValueError, match=message):
      export(model, tmp_path / "out", source=run)
  assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_released_writes_nothing(tmp_path):
  tanh = LanguageModel(dataclasses.replace(CONFIG, gelu="tanh"), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="gelu='tanh'"):
    export(tanh, tmp_path / "out" / "x.bin")
  assert not (tmp_path / "out").exists()
  assert from_pretrained(export(tanh, tmp_path / "out").path).config == tanh.config
