"""Export and import are bit-exact, a grown model keeps its function, and no existing file is overwritten."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx

from tests import oracle
from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.config import Config, MeshConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.inference.int8 import int8_tokens
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
  """A grown model whose new keys are no longer zero, as after training."""
  bigger, _ = grow(model, qkv_tokens=14, proj_tokens=10, ffn_tokens=40, method="exact")
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


def test_export_and_import_are_exact(tmp_path, model):
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
def test_a_grown_model_keeps_its_function_in_the_released_form(tmp_path, grown, name, settings):
  exported = export(grown, tmp_path / name, **settings)
  # proj was not grown; the others get k = min(N, d) rows.
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
  """Writes the files of a training run that an export reads."""
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(Config(model=CONFIG).to_dict()))
  rows = [{"step": step, "held_out/loss": 9.0 - step} for step in (1, 2, 3)]
  rows.append({"step": 4, "train/loss": 1.0})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  word_level_tokenizer().save(str(folder / "tokenizer.json"))
  return folder


def word_level_tokenizer(words=("a", "b")):
  return tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(["<|endoftext|>", *words])})
  )


def test_a_card_a_configuration_and_a_tokenizer_are_written_beside_the_weights(tmp_path, monkeypatch, model, grown):
  run = run_folder(tmp_path / "run")
  export(model, tmp_path / "a", source=run, step=2)
  assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  assert read_config(tmp_path / "a" / "config.json") == CONFIG
  plain = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
  assert plain.get_vocab() == word_level_tokenizer().get_vocab()
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
  monkeypatch.setenv("HOME", str(tmp_path))
  export(model, "~/b", source="~/run")
  assert (tmp_path / "b" / "tokenizer.json").is_file()
  assert "Held-out loss 6.0000 nats a token after 3 updates." in (tmp_path / "b" / "README.md").read_text()

  export(grown, tmp_path / "c" / "x.bin", source=tmp_path / "a" / "model.safetensors")
  card = (tmp_path / "c" / "README.md").read_text()
  for part in ("14 to each of qkv_tokens, 16 to each of ffn_tokens", "| qkv_slot_num | 28 |", "| rotary_pct | 0.5 |"):
    assert part in card, part
  assert "Held-out" not in card
  assert (tmp_path / "c" / "tokenizer.json").exists()


@pytest.mark.parametrize(
  "there", ["model.safetensors", "config.json", "README.md", "tokenizer.json", "tokenizer_config.json"]
)
def test_nothing_is_overwritten(tmp_path, model, there):
  (tmp_path / there).write_text("mine")
  with pytest.raises(ValueError, match=f"{there}: this file exists and is not overwritten"):
    export(model, tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == [there]
  assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("x.pt", {}, "ends in .pt cannot be written; choose .bin, .safetensors, or a folder"),
    ("x.bin", dict(released=False), "a .bin cannot store τ"),
    ("x.bin", dict(dtype="float8"), "dtype='float8': choose one of float32, bfloat16"),
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


@pytest.mark.parametrize(
  "changed, message",
  [
    (int8_tokens, "int8"),
    (LanguageModel.for_decoding, "a DecodingModel only decodes and cannot be exported"),
    (lambda model: model.blocks, "a Block has no released names"),
  ],
)
def test_a_model_in_another_form_is_refused(tmp_path, model, changed, message):
  with pytest.raises(ValueError, match=message):
    export(changed(model), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path, model):
  word_level_tokenizer([f"word{i}" for i in range(37)]).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match="this tokenizer has 38 ids and the model a vocabulary of 37"):
    export(model, tmp_path / "out", source=tmp_path)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_a_model_is_exported_to_a_bucket_and_read_from_it(bucket, model, name):  # noqa: F811
  exported = export(model, f"gs://bucket/models/{name}")
  assert str(exported.path) == f"gs://bucket/models/{name}"
  assert_equal(from_pretrained(exported.path), model)
  assert sorted(file.name for file in (bucket.folder / "models").iterdir()) == ["README.md", "config.json", name]


def test_a_model_that_cannot_be_released_writes_nothing(tmp_path):
  tanh = LanguageModel(dataclasses.replace(CONFIG, gelu="tanh"), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="gelu='tanh'"):
    export(tanh, tmp_path / "out" / "x.bin")
  assert not (tmp_path / "out").exists()
  assert from_pretrained(export(tanh, tmp_path / "out").path).config == tanh.config
