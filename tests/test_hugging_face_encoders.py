"""Folders of BERT and ViT are read and written back bit for bit, with their WordPiece and their normalisation of images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from PIL import Image

from tests.golden_files import GOLDEN, read, under
from tests.test_documents import blocks
from tests.test_hugging_face_files import assert_same_leaves
from tests.test_interop_pretrained import save
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.convert import convert
from tokenformer_jax.interop.hugging_face import model_from
from tokenformer_jax.interop.hugging_face_config import config_fields, model_config
from tokenformer_jax.interop.image_preprocessor import image_preprocessor
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.masked_language_model import MaskedLanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.models.text_encoder import TextClassifier, TextEncoder
from tokenformer_jax.models.vision_classifier import VisionClassifier, VisionEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "deja", "##s", "vu", "-", "!"]


def golden(name):
  """(config.json, arrays) of a model that transformers 5.23.0 was run on."""
  file = read(GOLDEN / f"{name}.npz")
  return file.description["config"], under(file.arrays, "param/")


def masked():
  fields, arrays = golden("bert/bert_mlm_A")
  return MaskedLanguageModel, fields, arrays


def classifier():
  fields, arrays = golden("bert/bert_classes_A")
  return TextClassifier, fields, arrays


def text_encoder():
  fields, arrays = golden("bert/bert_classes_A")
  arrays = {name.removeprefix("bert."): array for name, array in arrays.items() if name.startswith("bert.")}
  return TextEncoder, {**fields, "architectures": ["BertModel"]}, arrays


def images():
  """With the names of files, which differ from those in the memory of transformers 5."""
  fields, arrays = golden("dense/vit_A")
  names = dict(q_proj="attention.query", k_proj="attention.key", v_proj="attention.value", o_proj="output.dense")
  names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "vit.layers": "vit.encoder.layer"}
  renamed = {}
  for name, array in arrays.items():
    for new, old in names.items():
      name = name.replace(new, old)
    renamed[name] = array
  labels = {str(i): f"class {i}" for i in range(len(arrays["classifier.bias"]))}
  return VisionClassifier, {**fields, "architectures": ["ViTForImageClassification"], "id2label": labels}, renamed


def image_encoder():
  """Without a pooler, as models of images that were trained without labels have it."""
  _, fields, arrays = images()
  kept = {name.removeprefix("vit."): array for name, array in arrays.items() if name.startswith("vit.")}
  return VisionEncoder, {**fields, "architectures": ["ViTModel"]}, kept


def folder_of(path, fields, arrays, dtype="float32"):
  path.mkdir()
  (path / "config.json").write_text(json.dumps(fields))
  save(path / "model.safetensors", arrays, dtype)
  return path


@pytest.mark.parametrize("make, dtype", [(masked, "float32"), (classifier, "bfloat16"), (text_encoder, "float16")])
def test_bert_is_written_back_bit_for_bit(tmp_path, make, dtype):
  check_round_trip(tmp_path, *make(), dtype)
  assert data.open_tokenizer(str(tmp_path / "b")).encode("unaffable")[:1] == [5]
  settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
  assert (settings["mask_token"], settings["cls_token"]) == ("[MASK]", "[CLS]")


@pytest.mark.parametrize("make, dtype", [(images, "float32"), (image_encoder, "float16")])
def test_vit_is_written_back_bit_for_bit(tmp_path, make, dtype):
  check_round_trip(tmp_path, *make(), dtype)
  assert json.loads((tmp_path / "b" / "preprocessor_config.json").read_text()) == {"size": 16}


def check_round_trip(tmp_path, model_class, fields, arrays, dtype):
  source = folder_of(tmp_path / "a", fields, arrays, dtype)
  (source / "vocab.txt").write_text("\n".join(WORDS) + "\n")
  (source / "preprocessor_config.json").write_text('{"size": 16}')
  model = from_pretrained(source)
  assert type(model) is model_class
  assert_same_leaves(
    model, model_from(fields, {name: read.read() for name, read in open_weights(source).arrays.items()})
  )
  written = convert(source, tmp_path / "b", dtype=dtype).path
  before, after = open_weights(source).arrays, open_weights(written).arrays
  assert after.keys() == before.keys()
  for name, array in after.items():
    np.testing.assert_array_equal(array.read().view(np.uint8), before[name].read().view(np.uint8), err_msg=name)
  described = json.loads((tmp_path / "b" / "config.json").read_text())
  assert described["architectures"] == fields["architectures"]
  assert described["id2label"] == fields["id2label"]
  assert_same_leaves(from_pretrained(tmp_path / "b"), model)


def test_the_documented_functions_run_on_folders(tmp_path):
  names = {}
  exec(blocks("python", "docs/released_models.md")[-1], names)
  _, fields, arrays = images()
  folder = folder_of(tmp_path / "vit", fields, arrays)
  (folder / "preprocessor_config.json").write_text('{"size": 16}')
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "picture.png")
  logits = jax.jit(from_pretrained(folder))(pixels[None].astype(np.float32) / 127.5 - 1)
  assert names["class_of"](tmp_path / "picture.png", folder) == np.argmax(logits)
  _, fields, arrays = masked()
  folder = folder_of(tmp_path / "bert", fields, arrays)
  words = [*WORDS, *(f"word{i}" for i in range(80 - len(WORDS)))]
  (folder / "vocab.txt").write_text("\n".join(words))
  assert names["word_behind"]("deja [MASK] vu", str(folder)) in [word.removeprefix("##") for word in words]


def test_other_heads_copies_and_old_names_are_read(tmp_path):
  """As google-bert/bert-base-uncased has them."""
  _, fields, arrays = masked()
  old = {
    n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
    for n, a in arrays.items()
  }
  old["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"]
  old["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
  old["bert.embeddings.position_ids"] = np.zeros((1, 16), np.int64)
  unused = {"bert.pooler.dense.weight": np.ones((24, 24)), "cls.seq_relationship.bias": np.ones(2)}
  read = from_pretrained(folder_of(tmp_path / "a", fields, old | unused))
  assert_same_leaves(read, model_from(fields, arrays))
  old["cls.predictions.decoder.weight"] = old["cls.predictions.decoder.weight"] + 1
  with pytest.raises(ValueError, match="decoder.weight differs from bert.embeddings.word.*an untied bert is not supp"):
    from_pretrained(folder_of(tmp_path / "b", fields, old))


def test_one_message_names_every_array_that_does_not_fit(tmp_path):
  _, fields, arrays = masked()
  del arrays["cls.predictions.transform.dense.bias"]
  arrays["bert.encoder.layer.1.crossattention.self.key.bias"] = np.zeros(24)
  arrays["bert.embeddings.token_type_embeddings.weight"] = np.zeros((1, 24))
  with pytest.raises(ValueError) as caught:
    from_pretrained(folder_of(tmp_path / "a", fields, arrays))
  assert "\n" not in str(caught.value) and "does not fit the bert of its config.json" in str(caught.value)
  for text in (
    "missing 1: cls.predictions.transform.dense.bias",
    "unexpected 1: 'bert.encoder.layer.1.crossattention.self.key.bias'",
    "of another shape 1: bert.embeddings.token_type_embeddings.weight is (1, 24), not (2, 24)",
  ):
    assert text in str(caught.value)


@pytest.mark.parametrize(
  "name, changes, messages",
  [
    (
      "bert/bert_mlm_A",
      dict(position_embedding_type="relative_key", is_decoder=True, hidden_act="mish", tie_word_embeddings=False),
      [
        "position_embedding_type='relative_key' is not supported, only absolute",
        "is_decoder=True",
        "hidden_act='mish'",
      ],
    ),
    (
      "bert/bert_mlm_A",
      dict(architectures=["BertLMHeadModel"]),
      ["architectures=['BertLMHeadModel'] is not supported"],
    ),
    ("bert/bert_classes_A", dict(id2label=None, num_labels=0), ["num_labels=0 is not a number of classes"]),
    ("dense/vit_A", dict(qkv_bias=False, pooler_act="relu"), ["qkv_bias=False is not", "pooler_act='relu' is not"]),
    ("dense/vit_A", dict(image_size=[16, 16]), ["image_size=[16, 16] is not a whole number"]),
  ],
)
def test_one_line_names_all_that_is_not_supported(name, changes, messages):
  with pytest.raises(ValueError) as caught:
    model_config({**golden(name)[0], **changes})
  assert "\n" not in str(caught.value)
  for message in messages:
    assert message in str(caught.value)


@pytest.mark.parametrize(
  "config",
  [
    ModelConfig.named("tiny", "bert-original", token_types=3, ffn=dict(activation="silu"), norm_epsilon=1e-6),
    ModelConfig.named("tiny", "bert-original", task="classify", transform=False, classifier=dict(num_classes=1)),
    ModelConfig.named("tiny", "bert-original", task="encode", transform=False, classifier=dict(pooler_size=64)),
    ModelConfig.named("tiny", "vit", vision=dict(image_size=32, patch_size=8, channels=1, num_classes=7)),
    ModelConfig.named("tiny", "vit", task="encode", vision=dict(num_classes=0), classifier=dict(pooler_size=9)),
  ],
)
def test_every_supported_option_is_written_and_read(config):
  assert model_config(config_fields(config)) == config
  assert config_fields(dataclasses.replace(config, final_norm="rms_norm")) is None


def test_factors_of_transformed_logits_give_the_logits_and_their_bias():
  config = ModelConfig.named("tiny", "bert-original", vocab_size=12, hidden_size=8, num_heads=2, seq_length=4)
  rng = np.random.default_rng(0)
  hidden, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 8), (12,)))

  @jax.jit
  def both(bias):
    model = MaskedLanguageModel(config, rngs=nnx.Rngs(0))
    model.transform.logits_bias[...] = bias
    return model.logits(hidden), model.factors(hidden)

  logits, (x, table) = both(bias)
  assert np.max(np.abs(np.mean(logits, axis=(0, 1)) - bias)) < 0.5 < np.max(np.abs(bias))
  np.testing.assert_allclose(np.asarray(x, np.float64) @ np.asarray(table, np.float64).T, logits, atol=1e-6)
  with pytest.raises(TypeError, match="take `factors"):
    abstract_model(config).table()


def test_word_piece_of_a_vocabulary_gives_the_ids_of_the_tokenizers_package(tmp_path):
  (tmp_path / "vocab.txt").write_text("\r\n".join(WORDS))
  text = "Unaffable [MASK] Déjàs-vu!"
  expected = tokenizers.implementations.BertWordPieceTokenizer(str(tmp_path / "vocab.txt"))
  assert data.open_tokenizer(str(tmp_path)).encode(text) == expected.encode(text, add_special_tokens=False).ids
  assert data.open_tokenizer(str(tmp_path)).encode(text) == [5, 6, 7, 4, 8, 9, 11, 10, 12]
  (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
  assert data.open_tokenizer(str(tmp_path)).encode("Un un") == [1, 5]
  for words, message in (([*WORDS, "un"], "token 'un' stands there twice"), (WORDS[1:], r"has no \[PAD\]")):
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match=f"vocab.txt is not a vocabulary of WordPiece: .*{message}"):
      data.open_tokenizer(str(tmp_path))


def test_images_are_resized_and_normalised_as_the_folder_says(tmp_path):
  file = tmp_path / "preprocessor_config.json"
  file.write_text(
    json.dumps(dict(size=dict(height=4, width=6), image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4], resample=3))
  )
  pixels = np.random.default_rng(0).integers(0, 256, (8, 5, 3), np.uint8)
  resized = np.asarray(Image.fromarray(pixels).resize((6, 4), Image.Resampling.BICUBIC), np.float64)
  expected = (resized / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4]
  found = image_preprocessor(tmp_path)([pixels, Image.fromarray(pixels)])
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, np.stack([expected, expected]), atol=1e-6)
  with pytest.raises(ValueError, match="image 0: it has 1 channels and the model 3"):
    image_preprocessor(tmp_path)([pixels[..., 0]])
  file.write_text(json.dumps(dict(size=dict(shortest_edge=4), image_std=[0.0], do_center_crop=True)))
  with pytest.raises(ValueError) as caught:
    image_preprocessor(tmp_path)
  assert "\n" not in str(caught.value)
  for text in ("size={'shortest_edge': 4} is not supp", "image_std=[0.0] is not", "do_center_crop=True is not supp"):
    assert text in str(caught.value)
