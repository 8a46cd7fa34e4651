"""from_pretrained gives the released model's logits from every kind of file, and one line for every fault."""

import dataclasses
import functools
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests import small_run
from tests.golden_files import golden, under
from tests.parity_tokenformer import model_config
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.interop import stored_array
from tokenformer_jax.interop.names import from_released, released_shapes
from tokenformer_jax.interop.pretrained import TAU_KEY, from_pretrained
from tokenformer_jax.interop.safetensors_file import write_safetensors
from tokenformer_jax.interop.stored_array import ComputedArray, StoredArray
from tokenformer_jax.interop.torch_file import write_torch
from tokenformer_jax.interop.weight_config import CONFIG_KEY, config_json, read_config
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

refused = functools.partial(pytest.raises, ValueError)


@pytest.fixture(scope="module")
def released():
  """(state dict, configuration) of the tiny model that the released code was run on."""
  _, arrays, meta = golden("lm_A")
  return under(arrays, "param/"), model_config(meta["config"])


def save(path, arrays, dtype="float32", metadata=None):
  computed = {name: ComputedArray(array.shape, lambda array=array: array) for name, array in arrays.items()}
  if path.suffix == ".bin":
    write_torch(path, computed, dtype)
  else:
    write_safetensors(path, computed, dtype, metadata or {})
  return path


def shard(folder, arrays, suffix, metadata=None):
  """Two files and their index; returns the folder."""
  names = sorted(arrays)
  parts = {f"part-{i}{suffix}": names[i::2] for i in range(2)}
  for file, part in parts.items():
    save(folder / file, {name: arrays[name] for name in part}, metadata=metadata)
  stem = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
  weight_map = {name: file for file, part in parts.items() for name in part}
  # With the byte-order mark that some editors write.
  (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8-sig")
  return folder


@pytest.mark.parametrize(
  "form",
  ["a.bin", "a.safetensors", "a.pt", "~/a.bin", "pytorch_model.bin", "model.safetensors", ".bin", ".safetensors"],
)
def test_every_form_of_file_gives_the_released_logits(tmp_path, monkeypatch, released, form):
  arrays, config = released
  monkeypatch.setenv("HOME", str(tmp_path))
  if form.startswith("."):
    path = shard(tmp_path, arrays, form)
  else:
    name = form.removeprefix("~/")
    path = save(tmp_path / name.replace(".pt", ".bin"), arrays).rename(tmp_path / name)
    if form.startswith("~"):
      path = form
    elif form in ("a.pt", "pytorch_model.bin", "model.safetensors"):
      path = tmp_path
  golden_arrays = golden("lm_A").arrays
  model = from_pretrained(path, config)
  logits = jax.jit(model)(jnp.asarray(golden_arrays["tokens"]))
  assert np.abs(logits - golden_arrays["logits__f64"]).max() < 2e-5


def embeddings(path, config):
  return np.asarray(split(from_pretrained(path, config))[1]["embedding"])


EMBEDDING = "sequential.0.word_embeddings.weight"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "neox_model."])
def test_a_prefix_of_all_names_is_removed(tmp_path, released, prefix):
  arrays, config = released
  path = save(tmp_path / "a.safetensors", {prefix + name: array for name, array in arrays.items()})
  np.testing.assert_array_equal(embeddings(path, config), arrays[EMBEDDING])


def test_a_prefix_of_some_names_is_refused(tmp_path, released):
  arrays, config = released
  renamed = {name if "norm" in name else f"model.{name}": array for name, array in arrays.items()}
  with refused(match="name begins with 'model.' and 2 other names do not: .'sequential.5.norm.weight'"):
    from_pretrained(save(tmp_path / "a.safetensors", renamed), config)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_out.weight", "model.sequential.6.word_embeddings.weight"])
def test_buffers_and_an_equal_copy_of_the_embedding_are_ignored(tmp_path, released, name):
  arrays, config = released
  renamed = {f"model.{name}": array for name, array in arrays.items()}
  renamed["model.sequential.2.attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  path = save(tmp_path / "a.safetensors", {name: arrays[EMBEDDING], **renamed})
  np.testing.assert_array_equal(embeddings(path, config), arrays[EMBEDDING])


def test_another_output_matrix_is_refused(tmp_path, released):
  arrays, config = released
  other = arrays[EMBEDDING].copy()
  other[-1, -1] += 1e-3
  with refused(match="'lm_head.weight' has the embedding's shape and other numbers than 'sequential.0"):
    from_pretrained(save(tmp_path / "a.safetensors", {**arrays, "lm_head.weight": other}), config)


@pytest.mark.parametrize(
  "changed, message",
  [
    ({f"copy{i}.weight": None for i in range(5)}, "unexpected 5: 'copy0.weight'"),
    ({EMBEDDING: np.float32(1), "scale": np.float32(1)}, "not a released TokenFormer"),
  ],
)
def test_copies_that_no_program_writes_are_refused_without_being_read(
  tmp_path, monkeypatch, released, changed, message
):
  arrays, config = released
  changed = {name: arrays[EMBEDDING] if array is None else array for name, array in changed.items()}
  path = save(tmp_path / "a.safetensors", {**arrays, **changed})
  monkeypatch.setattr(StoredArray, "read", None)
  with refused(match=message):
    from_pretrained(path, config if "copy0.weight" in changed else None)


@pytest.fixture
def pipeline_folder(tmp_path, released):
  """A checkpoint as DeepSpeed's pipeline writes it; the folder of its step."""
  arrays, _ = released
  folder = tmp_path / "run" / "global_step9"
  folder.mkdir(parents=True)
  (tmp_path / "run" / "latest").write_text("global_step9\n")
  (folder / "mp_rank_00_model_states.pt").write_bytes(b"optimizer and arguments")
  for number in {int(name.split(".")[1]) for name in arrays}:
    layer = under(arrays, f"sequential.{number}.")
    if number == 2:
      layer["attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    name = f"layer_{number:02d}-model_00-model_states"
    save(folder / f"{name}.bin", layer).rename(folder / f"{name}.pt")
  return folder


def test_a_pipeline_folder_is_read_by_its_layers(pipeline_folder, released):
  arrays, config = released
  expected = jax.tree.leaves(from_released(arrays, config))
  for path in (pipeline_folder, pipeline_folder.parent):
    for leaf, array in zip(jax.tree.leaves(split(from_pretrained(path, config))[1]), expected, strict=True):
      np.testing.assert_array_equal(leaf, array)


def test_a_pipeline_folder_of_several_ranks_or_without_a_layer_is_refused(pipeline_folder, released):
  _, config = released
  (pipeline_folder.parent / "latest").write_text("../global_step9")
  with refused(match="names '../global_step9', which is not a folder beside it"):
    from_pretrained(pipeline_folder.parent, config)
  layer = pipeline_folder / "layer_03-model_00-model_states.pt"
  layer = layer.rename(pipeline_folder / "layer_03-model_01-model_states.pt")
  with refused(match=r"split over the model-parallel ranks \[0, 1\]; only rank 0"):
    from_pretrained(pipeline_folder, config)
  layer.unlink()
  with refused(match="num_layers=2 where the arrays have 1"):
    from_pretrained(pipeline_folder, config)


@pytest.mark.parametrize(
  "dtype, stored", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float64", np.float64)]
)
def test_other_types_become_float32(tmp_path, released, dtype, stored):
  arrays, config = released
  model = from_pretrained(save(tmp_path / "a.safetensors", arrays, dtype), config)
  _, parameters, _ = split(model)
  expected = arrays["sequential.0.word_embeddings.weight"].astype(stored).astype(np.float32)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters))
  np.testing.assert_array_equal(parameters["embedding"], expected)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(token=4, fsdp=2), MeshConfig(fsdp=8)])
def test_each_device_gets_its_shard(tmp_path, released, mesh):
  arrays, config = released
  path = save(tmp_path / "a.bin", arrays)
  expected = split(from_pretrained(path, config))[1:]
  model = from_pretrained(path, config, mesh=make_mesh(mesh))
  for leaf, whole in zip(jax.tree.leaves(split(model)[1:]), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(leaf, whole)
  keys = split(model)[1]["blocks"]["ffn"]["keys"]
  split_over = max(mesh.token, 1) * max(mesh.fsdp, 1)
  assert keys.addressable_shards[0].data.size * split_over == keys.size


def test_large_arrays_are_read_in_blocks(tmp_path, released, monkeypatch):
  arrays, config = released
  path = save(tmp_path / "a.bin", arrays)
  expected = jax.tree.leaves(split(from_pretrained(path, config))[1:])
  sizes = []
  read = StoredArray.read
  monkeypatch.setattr(stored_array, "_BLOCK_BYTES", 700)

  def noted(self, rows):
    array = read(self, rows)
    sizes.append(array.nbytes)
    return array

  monkeypatch.setattr(StoredArray, "read", noted)
  for mesh in (None, make_mesh(MeshConfig(token=4, fsdp=2))):
    for leaf, whole in zip(jax.tree.leaves(split(from_pretrained(path, config, mesh=mesh))[1:]), expected):
      np.testing.assert_array_equal(leaf, whole)
  assert 600 < max(sizes) <= 700


def test_a_loaded_model_has_the_structure_of_a_new_one(tmp_path, released):
  arrays, config = released
  loaded = from_pretrained(save(tmp_path / "a.bin", arrays), config)
  fresh = LanguageModel(config, rngs=nnx.Rngs(0))
  assert nnx.graphdef(loaded) == nnx.graphdef(fresh)
  for ours, theirs in zip(split(loaded)[1:], split(fresh)[1:]):

    def kinds(tree):
      return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    assert kinds(ours) == kinds(theirs)
  np.testing.assert_array_equal(loaded.blocks.ffn.tau[...], fresh.blocks.ffn.tau[...])


def test_a_named_size_is_recognised_by_its_shapes(tmp_path):
  config = ModelConfig.named("tiny", vocab_size=131)
  arrays = {name: np.zeros(shape, np.float32) for name, shape in released_shapes(config).items()}
  assert from_pretrained(save(tmp_path / "a.bin", arrays)).config == config


def test_the_order_of_sources_for_the_configuration(tmp_path, released):
  arrays, config = released
  path = save(tmp_path / "a.bin", arrays)
  with refused(
    match="no named size has its shapes. They determine vocab_size=96, num_layers=2, "
    "hidden_size=32, .*, but not num_heads, seq_length, theta, gelu"
  ):
    from_pretrained(path)
  (tmp_path / "config.json").write_text('{"architectures": ["Somebody", "else"]}')
  with refused(match="no named size has its shapes"):
    from_pretrained(path)
  (tmp_path / "config.json").write_text('{"model": {"theta": "soft')
  with refused(match="config.json: not JSON"):
    from_pretrained(path)
  (tmp_path / "config.json").write_text(config_json(config), encoding="utf-8-sig")
  assert from_pretrained(path).config == config
  assert read_config(tmp_path / "config.json") == config
  told = dataclasses.replace(config, num_heads=2)
  metadata = {CONFIG_KEY: json.dumps(dataclasses.asdict(told))}
  assert from_pretrained(save(tmp_path / "b.safetensors", arrays, metadata=metadata)).config == told
  asked = dataclasses.replace(config, theta="softmax")
  assert from_pretrained(tmp_path / "b.safetensors", asked).config == asked


def test_tau_is_read_from_the_metadata(tmp_path, released):
  arrays, config = released
  tau = {
    f"sequential.{i}.{name}": float(np.float32(i + 0.1 * j))
    for i in (2, 3)
    for j, name in enumerate(("attention.query", "attention.key", "attention.value", "attention.proj", "mlp"))
  }
  path = save(tmp_path / "a.safetensors", arrays, metadata={TAU_KEY: json.dumps(tau)})
  read = split(from_pretrained(path, config))[2]["blocks"]
  assert read["attention"]["key"]["tau"].tolist() == [tau[f"sequential.{i}.attention.key"] for i in (2, 3)]
  assert read["ffn"]["tau"].tolist() == [tau["sequential.2.mlp"], tau["sequential.3.mlp"]]
  # The shards of a model each carry the metadata of the whole.
  folder = shard(tmp_path, arrays, ".safetensors", {TAU_KEY: json.dumps(tau)})
  small_run.assert_same(split(from_pretrained(folder, config))[2], split(from_pretrained(path, config))[2])
  save(folder / "part-1.safetensors", {name: arrays[name] for name in sorted(arrays)[1::2]}, metadata={TAU_KEY: "{}"})
  with pytest.raises(ValueError, match="part-1.safetensors has another 'tokenformer_jax.tau'"):
    from_pretrained(folder, config)


SIZES = dict(
  vocab_size=9, num_layers=2, hidden_size=4, num_heads=1, qkv_tokens=1, proj_tokens=1, ffn_tokens=1, rotary_fraction=0
)


@pytest.mark.parametrize(
  "change, message",
  [
    ({TAU_KEY: "{"}, "expected a positive number for each"),
    ({TAU_KEY: "[1]"}, "expected a positive number for each"),
    ({TAU_KEY: '{"sequential.2.mlp": 1e39}'}, "expected a positive number for each"),
    ({TAU_KEY: '{"sequential.2.mlp": NaN}'}, "expected a positive number for each"),
    ({TAU_KEY: '{"sequential.2.mlp": 0}'}, "expected a positive number for each"),
    ({TAU_KEY: '{"sequential.2.mlp": 2.0}'}, r"is for \['sequential.2.mlp'\]; expected"),
    ({CONFIG_KEY: "{"}, "config in its metadata is not JSON"),
    ({CONFIG_KEY: "[" * 100_000}, "config in its metadata is not JSON"),
    ({CONFIG_KEY: '{"num_head": 4}'}, "num_head is unknown. Did you mean 'num_heads'"),
    ({CONFIG_KEY: json.dumps({**SIZES, "num_layers": 10**12})}, "23 arrays are not such a model"),
    ({CONFIG_KEY: json.dumps({**SIZES, "hidden_size": 2**40})}, "23 arrays are not such a model"),
  ],
)
def test_bad_metadata_is_refused(tmp_path, released, change, message):
  arrays, config = released
  path = save(tmp_path / "a.safetensors", arrays, metadata=change)
  with refused(match=message):
    from_pretrained(path, config if TAU_KEY in change else None)


def test_a_configuration_that_does_not_fit(tmp_path, released):
  arrays, config = released
  path = save(tmp_path / "a.bin", arrays)
  with refused(
    match="the configuration is that of another model: vocab_size=97 where the arrays have "
    "96, num_layers=3 where .* 2, ffn_tokens=65 where the arrays have 64."
  ):
    from_pretrained(path, dataclasses.replace(config, vocab_size=97, num_layers=3, ffn_tokens=65))


def test_one_message_names_all_arrays_that_do_not_fit(tmp_path, released):
  arrays, config = released
  changed = {name: array for name, array in arrays.items() if not name.endswith("3.mlp.value_param_tokens")}
  changed["sequential.5.norm.weight"] = np.zeros(31)
  changed["optimizer.step"] = np.zeros(1)
  with refused(
    match="a.bin does not fit .* missing 1: sequential.3.mlp.value_param_tokens; "
    "unexpected 1: 'optimizer.step'; of another shape 1: sequential.5.norm"
  ):
    from_pretrained(save(tmp_path / "a.bin", changed), config)
  # The same holds if one of the arrays that determine the sizes is missing.
  del changed["sequential.2.mlp.key_param_tokens"]
  with refused(match="missing 2: sequential.2.mlp.key_param_tokens, sequential.3.mlp.value"):
    from_pretrained(save(tmp_path / "a.bin", changed), config)
  with refused(match="not a released TokenFormer, because it has no matrix sequential.2.mlp.key_param"):
    from_pretrained(tmp_path / "a.bin")


def test_integer_arrays_are_refused(tmp_path, released):
  arrays, config = released
  with refused(match="is of type int8; expected one of float64, float32, float16, bfloat16"):
    from_pretrained(save(tmp_path / "a.safetensors", arrays, "int8"), config)


def test_numbers_that_are_not_finite_are_refused(tmp_path, released):
  arrays, config = released
  name = "sequential.3.attention.proj.value_param_tokens"
  for bad, dtype in ((np.nan, "float32"), (-np.inf, "float32"), (1e300, "float64")):
    broken = arrays[name].astype(dtype)
    broken[3, 5] = bad
    path = save(tmp_path / "a.safetensors", {**arrays, name: broken}, dtype)
    with refused(match=f"{name} has 1 numbers that are NaN or infinite"):
      from_pretrained(path, config)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "an empty file"),
    (b"<!DOCTYPE html><html>", "an HTML or XML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a git-lfs pointer"),
    (b"\x80\x02}q\x00.", "a bare pickle"),
    (b"PK\x03\x04 and so on", "damaged zip archive"),
    (b"just text, and long enough", "it begins with b'just text"),
  ],
)
def test_the_message_says_what_a_file_is_that_has_no_weights(tmp_path, content, message):
  (tmp_path / "pytorch_model.bin").write_bytes(content)
  for path in (tmp_path, tmp_path / "pytorch_model.bin"):
    with refused(match=message) as caught:
      from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "index, message",
  [
    ("{", "not an index of weight files"),
    ("[]", "not an index of weight files"),
    ("[" * 100_000, "not an index of weight files"),
    ('{"weight_map": ["a"]}', "not an index of weight files"),
    ('{"weight_map": {"x": "../a.bin"}}', "'../a.bin' is not a weight file in the folder"),
    ('{"weight_map": {"x": "/a.bin"}}', "'/a.bin' is not a weight file"),
    ('{"weight_map": {"x": "pytorch_model.bin.index.json"}}', "is not a weight file"),
    ('{"weight_map": {"x": 5}}', "'5' is not a weight file"),
    ('{"weight_map": {"x": "lost.bin"}}', "lost.bin: there is no such file"),
    ('{"weight_map": {"x": "a.bin", "y": "a.bin"}}', "'x' is not in a.bin, and 1 other arrays"),
  ],
)
def test_a_bad_index_is_refused(tmp_path, index, message):
  save(tmp_path / "a.bin", {"z": np.zeros(1)})
  (tmp_path / "pytorch_model.bin.index.json").write_text(index)
  with refused(match=message):
    from_pretrained(tmp_path)


def test_a_path_without_one_weight_file_is_refused(tmp_path, released):
  with refused(match="no such file or folder, and it is not a name OWNER/MODEL"):
    from_pretrained(tmp_path / "nowhere")
  with refused(match="no such file or folder, and it is not a name OWNER/MODEL"):
    from_pretrained("lost/pytorch_model.bin")
  with refused(match="path='': the path is empty"):
    from_pretrained("")
  with refused(match="has none of model.safetensors, .* and 0 files"):
    from_pretrained(tmp_path)
  arrays, config = released
  save(tmp_path / "any.bin", arrays)
  assert from_pretrained(tmp_path, config).config == config
  save(tmp_path / "more.bin", arrays)
  with refused(match="and 2 files that end in .safetensors, .bin, .pt, .pth; name the file itself"):
    from_pretrained(tmp_path)


def test_a_model_of_the_hub_is_downloaded(tmp_path, released, monkeypatch):
  arrays, config = released
  save(tmp_path / "pytorch_model.bin", arrays)
  asked = []

  def download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: ["a.bin", "README.md"])
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert from_pretrained("somebody/TokenFormer-tiny", config).config == config
  patterns = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
  patterns += ["merges.txt", "vocab.txt", "*.bin", "*.bin.index.json"]
  assert asked == [("somebody/TokenFormer-tiny", patterns)]

  def fail(self, name):
    raise OSError("no network\nat all")

  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
  with refused(match=r"the Hugging Face hub does not provide it \(no network\)"):
    from_pretrained("somebody/TokenFormer-tiny")
