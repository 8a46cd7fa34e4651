"""Folders as Hugging Face writes them are read, and written back bit for bit."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from tests.test_documents import blocks
from tests.test_hugging_face import FAMILIES, golden
from tests.test_interop_pretrained import save, shard
from tokenformer_jax.config import Config, MeshConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.hugging_face import model_from
from tokenformer_jax.interop.hugging_face_config import model_config
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.interop.weight_config import read_config
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import load, load_tokenizer
from tokenformer_jax.training.resume import check_same_weights


def folder_of(path, family, arrays=None, name="model.safetensors", dtype="float32", **changes):
  """A folder with the golden model's config.json and arrays, or with changed ones."""
  fields, parameters = golden(family)
  path.mkdir()
  (path / "config.json").write_text(json.dumps({**fields, **changes}))
  save(path / name, parameters if arrays is None else arrays, dtype)
  return path


def leaves(model):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(split(model)[1])}


def assert_same_leaves(model, other):
  expected = leaves(other)
  assert leaves(model).keys() == expected.keys()
  for path, leaf in leaves(model).items():
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("family, suffix", [*zip(FAMILIES, (".safetensors", ".bin", ".safetensors"))])
def test_shards_are_read_onto_a_mesh(tmp_path, family, suffix):
  fields, parameters = golden(family)
  (tmp_path / "config.json").write_text(json.dumps(fields))
  mesh = make_mesh(MeshConfig(token=2, fsdp=2), devices=jax.devices()[:4])
  model = from_pretrained(shard(tmp_path, parameters, suffix), mesh=mesh)
  assert model.config == model_config(fields)
  assert_same_leaves(model, model_from(fields, parameters))


@pytest.mark.parametrize(
  "family, name, dtype",
  [
    ("gpt_neox", "pytorch_model.bin", "float16"),
    ("gpt2", "model.safetensors", "float32"),
    ("llama", "model.safetensors", "bfloat16"),
  ],
)
def test_arrays_are_written_back_bit_for_bit(tmp_path, family, name, dtype):
  source = folder_of(tmp_path / "a", family, name=name, dtype=dtype, hidden_dropout=0.25)
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}))
  words.save(str(source / "tokenizer.json"))
  written = export(load(str(source)), tmp_path / "b" / name, dtype=dtype, source=source).path
  before, after = open_weights(source).arrays, open_weights(written).arrays
  renamed = {n.replace("embed_out", "lm_head") if family == "gpt_neox" else n: array for n, array in after.items()}
  assert renamed.keys() == before.keys()
  for n, array in renamed.items():
    assert array.dtype == before[n].dtype == dtype
    np.testing.assert_array_equal(array.read().view(np.uint8), before[n].read().view(np.uint8), err_msg=n)
  fields = json.loads((tmp_path / "b" / "config.json").read_text())
  assert model_config(fields) == model_config(golden(family)[0])
  kept = ("eos_token_id", "hidden_dropout", "torch_dtype", "dtype")
  assert [fields[name] for name in kept] == [golden(family)[0]["eos_token_id"], 0.25, dtype, dtype]
  assert load_tokenizer(str(tmp_path / "b")).encode("a") == [1]
  assert "names of transformers" in (tmp_path / "b" / "README.md").read_text()


def test_names_without_prefix_buffers_and_a_copy_of_the_embedding_are_read(tmp_path):
  """As gpt2 lies on the hub, and as PyTorch's files have a tied head."""
  _, parameters = golden("gpt2")
  arrays = {name.removeprefix("transformer."): array for name, array in parameters.items()}
  arrays["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
  arrays["lm_head.weight"] = parameters["transformer.wte.weight"]
  assert_same_leaves(from_pretrained(folder_of(tmp_path / "b", "gpt2", arrays)), model_from(*golden("gpt2")))
  arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
  with pytest.raises(
    ValueError, match="lm_head.weight differs from transformer.wte.weight, but .*tie_word_embeddings=true"
  ):
    from_pretrained(folder_of(tmp_path / "c", "gpt2", arrays))
  untied = from_pretrained(folder_of(tmp_path / "d", "gpt2", arrays, tie_word_embeddings=False))
  np.testing.assert_array_equal(untied.head[...], arrays["lm_head.weight"])


def test_one_message_names_every_array_that_does_not_fit(tmp_path):
  arrays = dict(golden("llama")[1])
  del arrays["model.layers.1.self_attn.k_proj.weight"], arrays["model.norm.weight"]
  arrays["model.layers.1.self_attn.k_norm.weight"] = np.zeros(8, np.float32)
  arrays["lm_head.weight"] = arrays["lm_head.weight"][1:]
  folder = folder_of(tmp_path / "a", "llama", arrays, intermediate_size=81)
  with pytest.raises(ValueError) as caught:
    from_pretrained(folder)
  message = str(caught.value)
  assert "\n" not in message and "does not fit the llama of its config.json" in message
  assert "missing 2: model.layers.1.self_attn.k_proj.weight, model.norm.weight;" in message
  assert "unexpected 1: 'model.layers.1.self_attn.k_norm.weight'" in message
  assert "of another shape 7: " in message and "lm_head.weight is (95, 32), not (96, 32)" in message


def test_arrays_of_whole_numbers_are_refused(tmp_path):
  folder = folder_of(tmp_path / "a", "llama", dtype="int8")
  with pytest.raises(ValueError, match="of a type other than float64, float32, float16, bfloat16 21: model.embed_"):
    from_pretrained(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(model_type="mistral"), "model_type='mistral' is not supported"),
    (dict(num_hidden_layers=10**9), "a model of 1000000000 layers; the 21 arrays are not such a model"),
    (None, "names of a Hugging Face llama; put the config.json of that model beside it"),
  ],
)
def test_a_configuration_that_is_not_of_these_arrays_is_refused(tmp_path, changes, message):
  folder = folder_of(tmp_path / "a", "llama", **(changes or {}))
  if changes is None:
    (folder / "config.json").unlink()
  with pytest.raises(ValueError, match=message):
    from_pretrained(folder)


def test_the_users_configuration_may_change_how_it_is_computed_and_not_what(tmp_path):
  folder = folder_of(tmp_path / "a", "llama")
  config = dataclasses.replace(read_config(folder / "config.json"), compute_dtype="bfloat16", seq_length=4096)
  model = from_pretrained(folder, config)
  assert model.config == config
  # The file's metadata has what config.json cannot say.
  assert from_pretrained(export(model, tmp_path / "b").path).config == config
  other = dataclasses.replace(config, rotary_base=5e5, norm_epsilon=1e-6)
  with pytest.raises(ValueError, match="norm_epsilon=1e-06 where .* 1e-05, rotary_base=500000.0 where .* 10000.0"):
    from_pretrained(folder, other)


def test_a_number_too_large_for_float16_is_refused(tmp_path):
  model = model_from(*golden("gpt2"))
  model.embedding[...] = model.embedding[...].at[0, 0].set(-7e4)
  with pytest.raises(ValueError, match="transformer.wte.weight: it has a number above 65504"):
    export(model, tmp_path, dtype="float16")
  assert not (tmp_path / "model.safetensors").exists()
  exported = safetensors.numpy.load_file(export(model, tmp_path, dtype="bfloat16").path)
  assert exported["transformer.wte.weight"][0, 0] == ml_dtypes.bfloat16(-7e4)


def test_the_documented_configuration_fits_the_weights_of_a_folder(tmp_path, monkeypatch):
  folder_of(tmp_path / "pythia-160m", "gpt_neox")
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(blocks("python", "docs/released_models.md")[-2], names)
  config = Config.from_dict(names["get_config"]())
  check_same_weights(load(config.init_from).config, config.model, config.init_from)
