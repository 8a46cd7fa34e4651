import copy
import hashlib
import json

import huggingface_hub
import numpy as np
import pytest
import tokenizers

from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.data import byte_level_bpe
from tokenformer_jax.data import tokenizer as tokenizer_module
from tokenformer_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tokenformer_jax.data.tokenizer_files import load_tokenizer, open_tokenizer, save_tokenizer
from tokenformer_jax.inference.continuation import Continuation

TEXT = "def main():\n  return 'naïve café 東京 🙂'\n\n\nThe end, the end. 12 345\n" * 20


@pytest.fixture(scope="module")
def bpe():
  return HuggingFaceTokenizer(byte_level_bpe.train([TEXT], 300), "<|endoftext|>")


def test_bytes_are_utf8_with_256_as_the_end_of_a_document():
  tokenizer = ByteTokenizer()
  assert tokenizer.encode(TEXT) == list(TEXT.encode())
  assert tokenizer.decode([*tokenizer.encode(TEXT), 256]) == TEXT
  assert (tokenizer.vocab_size, tokenizer.padded_vocab_size, tokenizer.end_of_document) == (257, 384, 256)
  assert tokenizer.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("bad", [257, -1])
def test_ids_without_text_are_refused_with_their_position(bad):
  with pytest.raises(ValueError, match=f"id {bad} at position 1"):
    ByteTokenizer().decode([65, bad])


@pytest.mark.parametrize("size, padded", [(50277, 50304), (50257, 50304), (50304, 50304), (50305, 50432)])
def test_vocabulary_is_padded_to_128_as_released(size, padded):
  tokenizer = ByteTokenizer()
  tokenizer.vocab_size = size
  assert tokenizer.padded_vocab_size == padded
  assert tokenizer.dtype == np.uint16


def test_text_that_is_not_unicode_is_refused(bpe):
  for tokenizer in (bpe, ByteTokenizer()):
    with pytest.raises(ValueError, match="not Unicode at character 2"):
      tokenizer.encode("ab\udcff")


def test_a_trained_bpe_gives_text_back_and_shortens_it(bpe):
  assert bpe.decode([*bpe.encode(TEXT), bpe.end_of_document]) == TEXT
  assert len(bpe.encode(TEXT)) < len(TEXT.encode()) * 0.8
  assert bpe.vocab_size == 300 and bpe.encode("<|endoftext|>") == [bpe.end_of_document]


def metaspace(model, trainer):
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  tokenizer.train_from_iterator(["the cat sat on the mat, the end"] * 5, trainer)
  return HuggingFaceTokenizer(json.loads(tokenizer.to_str()), "</s>")


@pytest.fixture(scope="module")
def not_byte_level():
  special = dict(special_tokens=["<unk>", "</s>"], show_progress=False)
  wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
  wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  wordpiece.decoder = tokenizers.decoders.WordPiece()
  wordpiece.train_from_iterator(
    ["the cat sat on the mat, the end"] * 5, tokenizers.trainers.WordPieceTrainer(vocab_size=60, **special)
  )
  return {
    "unigram": metaspace(
      tokenizers.models.Unigram(), tokenizers.trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **special)
    ),
    "bpe": metaspace(
      tokenizers.models.BPE(unk_token="<unk>"), tokenizers.trainers.BpeTrainer(vocab_size=60, **special)
    ),
    "wordpiece": HuggingFaceTokenizer(json.loads(wordpiece.to_str()), "</s>"),
  }


def continued(tokenizer, prompt, ids) -> str:
  """The text of `ids` as generation writes it after the prompt."""
  continuation = Continuation(tokenizer, prompt=prompt)
  for i in ids:
    continuation.read(i)
  return continuation.text


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_a_continuation_keeps_the_space_after_its_prompt(kind, not_byte_level):
  tokenizer = not_byte_level[kind]
  ids = tokenizer.encode("the cat sat, the mat")
  assert tokenizer.decode(ids) == "the cat sat, the mat"
  for cut in range(len(ids) + 1):
    assert tokenizer.decode(ids[:cut]) + continued(tokenizer, ids[:cut], ids[cut:]) == "the cat sat, the mat"
  prompt, continuation = tokenizer.encode("the"), tokenizer.encode("cat")
  assert continued(tokenizer, prompt, continuation) == " cat"
  # After an end of document a new text begins, which has no space before its first word.
  assert continued(tokenizer, [*prompt, tokenizer.end_of_document], continuation) == "cat"


def test_a_continuation_completes_the_character_that_its_prompt_began():
  tokenizer, ids = ByteTokenizer(), list("a€b".encode())
  assert continued(tokenizer, ids[:2], ids[2:]) == "€b"
  assert continued(tokenizer, ids[:2], ids[2:3]) == ""
  assert continued(tokenizer, ids[:1], ids[1:3]) == "\ufffd"
  assert continued(tokenizer, ids[:4], ids[4:]) == "b"


def test_a_character_in_byte_tokens_leaves_the_characters_before_it_as_they_are():
  vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
  model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
  llama = tokenizers.Tokenizer(model)
  llama.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  tokenizer = HuggingFaceTokenizer(json.loads(llama.to_str()), "</s>")
  ids = tokenizer.encode("東京都")
  assert len(ids) == 9
  texts = [continued(tokenizer, ids[:3], ids[3 : 3 + count]) for count in range(7)]
  assert texts == ["", "\ufffd", "\ufffd", "京", "京\ufffd", "京\ufffd", "京都"]
  assert continued(tokenizer, ids[:4], ids[4:6]) == "京"
  assert tokenizer.decode(ids[1:]) == "\ufffd\ufffd京都"


def test_a_bpe_that_is_too_small_for_all_bytes_is_refused():
  with pytest.raises(ValueError, match="BPE of 256 ids"):
    byte_level_bpe.train([TEXT], 256)


@pytest.fixture
def saved(bpe, tmp_path):
  """A function that saves a tokenizer in a new folder and returns the path of its tokenizer.json."""

  def save(tokenizer=bpe, name="tokenizer.json"):
    folder = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    save_tokenizer(tokenizer, folder / name)
    return folder / name

  return save


def test_saved_tokenizers_are_restored_with_their_settings(bpe, saved):
  as_text = HuggingFaceTokenizer(bpe.huggingface(), "<|endoftext|>", "text")
  other_end = HuggingFaceTokenizer(bpe.huggingface(), "e")
  for tokenizer in (bpe, as_text, other_end, ByteTokenizer()):
    path = saved(tokenizer)
    loaded = load_tokenizer(path)
    assert loaded.encode(TEXT + "<|endoftext|>") == tokenizer.encode(TEXT + "<|endoftext|>")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.end_of_document == tokenizer.end_of_document
    assert open_tokenizer(str(path.parent)).fingerprint == tokenizer.fingerprint
    assert {p.name for p in path.parent.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_saved_files_are_in_the_format_of_hugging_face(bpe, saved):
  for tokenizer in (bpe, ByteTokenizer()):
    path = saved(tokenizer)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ids = theirs.encode(TEXT).ids
    assert ids == tokenizer.encode(TEXT) and theirs.decode(ids) == TEXT
    config = json.loads((path.parent / "tokenizer_config.json").read_text())
    assert theirs.token_to_id(config["eos_token"]) == tokenizer.end_of_document
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_files_of_earlier_releases_are_read_and_brought_into_the_present_format(bpe, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(
    json.dumps({"kind": "huggingface", "end_of_document": "<|endoftext|>", "tokenizer": bpe.huggingface()})
  )
  assert load_tokenizer(path).fingerprint == bpe.fingerprint
  save_tokenizer(bpe, path)
  assert json.loads(path.read_text()) == bpe.huggingface()
  path.write_text('{"kind": "bytes"}')
  assert load_tokenizer(path).fingerprint == ByteTokenizer().fingerprint


def test_files_that_are_not_this_tokenizer_are_never_overwritten(bpe, saved, tmp_path):
  other = saved(ByteTokenizer())
  foreign, config = tmp_path / "notes.json", tmp_path / "tokenizer_config.json"
  foreign.write_text('{"mine": 1}')
  config.write_text('{"eos_token": "</s>"}')
  for path, words in ((other, "holds another"), (foreign, "is not overwritten"), (config, "not written by this")):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
      save_tokenizer(bpe, path if path != config else tmp_path / "tokenizer.json")
    assert path.read_bytes() == before
  # The same tokenizer, written by another program, is not touched either.
  foreign.write_text(json.dumps(bpe.huggingface(), indent=7))
  save_tokenizer(bpe, foreign)
  assert foreign.read_text() == json.dumps(bpe.huggingface(), indent=7)


def test_tokenizer_files_may_be_in_a_bucket(bpe, bucket):  # noqa: F811
  save_tokenizer(bpe, "gs://bucket/run/tokenizer.json")
  assert (bucket.folder / "run" / "tokenizer_config.json").is_file()
  assert load_tokenizer("gs://bucket/run/tokenizer.json").fingerprint == bpe.fingerprint
  assert open_tokenizer("gs://bucket/run").fingerprint == bpe.fingerprint
  with pytest.raises(ValueError, match="'gs://bucket/other' does not exist"):
    open_tokenizer("gs://bucket/other")


def test_a_byte_order_mark_is_no_part_of_a_file(bpe, saved):
  path = saved()
  for file in path.parent.iterdir():
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
  assert load_tokenizer(path).fingerprint == bpe.fingerprint


def test_an_empty_path_is_refused():
  for spec in ("", "#<|endoftext|>"):
    with pytest.raises(ValueError, match="the path is empty"):
      open_tokenizer(spec)


def test_the_text_of_a_special_token_is_text_if_asked(bpe, saved):
  text = "a<|endoftext|>b"
  assert bpe.encode(text) == [*bpe.encode("a"), bpe.end_of_document, *bpe.encode("b")]
  as_text = HuggingFaceTokenizer(bpe.huggingface(), "<|endoftext|>", special_tokens="text")
  assert as_text.end_of_document not in as_text.encode(text) and as_text.decode(as_text.encode(text)) == text
  assert as_text.fingerprint != bpe.fingerprint
  path = str(saved(as_text))
  assert open_tokenizer(path, special_tokens="text").encode(text) == as_text.encode(text)
  with pytest.raises(ValueError, match="saved with special_tokens='text', not 'recognise': set data.special_tokens"):
    open_tokenizer(path, special_tokens="recognise")
  with pytest.raises(ValueError, match="special_tokens='none' is unknown"):
    open_tokenizer(str(saved()), special_tokens="none")


def test_text_is_impossible_where_the_vocabulary_itself_has_the_special_token():
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  with pytest.raises(ValueError, match="gives the text '</s>' the id 1"):
    HuggingFaceTokenizer(json.loads(words.to_str()), "</s>", special_tokens="text")


def test_fingerprints_differ_where_the_ids_do(bpe):
  other = HuggingFaceTokenizer(byte_level_bpe.train([TEXT.upper()], 300), "<|endoftext|>")
  ignoring = copy.deepcopy(bpe.huggingface())
  ignoring["model"]["ignore_merges"] = True
  unsplit = copy.deepcopy(bpe.huggingface())
  unsplit["pre_tokenizer"]["use_regex"] = False
  changed = [HuggingFaceTokenizer(description, "<|endoftext|>") for description in (ignoring, unsplit)]
  assert len({t.fingerprint for t in (bpe, other, ByteTokenizer(), *changed)}) == 5


def older(description):
  """The description as releases of `tokenizers` from before 0.20 write it."""
  description = copy.deepcopy(description)
  model = description["model"]
  model["merges"] = [" ".join(merge) for merge in model["merges"]]
  model["vocab"] = dict(reversed(model["vocab"].items()))
  for option in ("byte_fallback", "ignore_merges", "dropout"):
    del model[option]
  del description["pre_tokenizer"]["use_regex"], description["version"]
  return description


def test_the_fingerprint_does_not_change_with_the_version_of_the_tokenizers_package(bpe):
  for description in (older(bpe.huggingface()), json.loads(bpe._tokenizer.to_str())):
    tokenizer = HuggingFaceTokenizer(description, "<|endoftext|>")
    assert tokenizer.encode(TEXT) == bpe.encode(TEXT)
    assert tokenizer.fingerprint == bpe.fingerprint


def test_the_fingerprint_of_metaspace_does_not_change_with_the_version(not_byte_level):
  description = copy.deepcopy(not_byte_level["unigram"].huggingface())
  for part in ("pre_tokenizer", "decoder"):
    description[part] = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
  assert HuggingFaceTokenizer(description, "</s>").fingerprint == not_byte_level["unigram"].fingerprint


def test_fingerprints_that_earlier_releases_stored_are_recognised(bpe):
  tokenizer = HuggingFaceTokenizer(older(bpe.huggingface()), "<|endoftext|>")
  stored = {"kind": "huggingface", "end_of_document": "<|endoftext|>", "tokenizer": tokenizer.huggingface()}
  text = json.dumps(stored, ensure_ascii=False, sort_keys=True)
  assert tokenizer.matches(hashlib.sha256(text.encode()).hexdigest()) and tokenizer.matches(bpe.fingerprint)
  assert not tokenizer.matches(ByteTokenizer().fingerprint)
  assert ByteTokenizer().fingerprint == hashlib.sha256(b'{"kind": "bytes"}').hexdigest()


def test_vocab_and_merges_make_the_tokenizer_of_the_json(bpe, tmp_path):
  description = copy.deepcopy(bpe.huggingface())
  vocab = description["model"]["vocab"] | {"<|endoftext|>": bpe.end_of_document}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  (tmp_path / "hf.json").write_text(json.dumps(description))
  for where in (tmp_path, tmp_path / "merges.txt", tmp_path / "vocab.json", tmp_path / "hf.json"):
    tokenizer = open_tokenizer(str(where))
    assert tokenizer.encode(TEXT) == bpe.encode(TEXT)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.end_of_document] == [bpe.end_of_document]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_truncation_and_padding_of_a_json_are_switched_off(bpe):
  raw = tokenizers.Tokenizer.from_str(json.dumps(bpe.huggingface()))
  raw.enable_truncation(5)
  raw.enable_padding(length=10)
  tokenizer = HuggingFaceTokenizer(json.loads(raw.to_str()), "<|endoftext|>")
  assert tokenizer.encode(TEXT) == bpe.encode(TEXT) and tokenizer.encode("a") == bpe.encode("a")
  assert tokenizer.fingerprint == bpe.fingerprint


def test_long_texts_are_cut_where_it_changes_no_id(bpe, monkeypatch):
  whole = bpe.encode(TEXT)
  monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 50)
  pieces = list(bpe._cut(TEXT))
  assert len(pieces) > 10 and "".join(pieces) == TEXT
  assert bpe.encode(TEXT) == whole
  assert [ids.tolist() for ids in bpe.encode_documents(["a", TEXT, ""])] == [bpe.encode("a"), whole, []]
  # A tokenizer that puts a space before every text must not be cut: each piece would get one.
  description = copy.deepcopy(bpe.huggingface())
  description["pre_tokenizer"] |= {"add_prefix_space": True}
  prefixing = HuggingFaceTokenizer(description, "<|endoftext|>")
  assert list(prefixing._cut("word\n" * 50)) == ["word\n" * 50]


def test_the_token_that_ends_documents_can_be_named(bpe, saved, tmp_path):
  description = copy.deepcopy(bpe.huggingface())
  description["added_tokens"][0]["content"] = "<stop>"
  description["model"]["vocab"].pop("<|endoftext|>", None)
  description["model"]["vocab"]["<stop>"] = bpe.end_of_document
  (tmp_path / "hf.json").write_text(json.dumps(description))
  with pytest.raises(ValueError, match="has none of <|endoftext|>"):
    open_tokenizer(f"{tmp_path}/hf.json")
  with pytest.raises(ValueError, match="'<halt>' is not in this tokenizer's vocabulary"):
    open_tokenizer(f"{tmp_path}/hf.json#<halt>")
  stop = open_tokenizer(f"{tmp_path}/hf.json#<stop>")
  assert stop.end_of_document == bpe.end_of_document
  assert load_tokenizer(saved(stop)).fingerprint == stop.fingerprint
  # A folder from Hugging Face names the token in its config.
  (tmp_path / "hf_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
  assert open_tokenizer(f"{tmp_path}/hf.json").fingerprint == stop.fingerprint


def test_names_are_looked_up_on_the_hub(bpe, tmp_path, monkeypatch):
  path = tmp_path / "hub.json"
  path.write_text(json.dumps(bpe.huggingface()))
  asked = []

  def download(*args):
    asked.append(args)
    if args[0] != "some/model":
      raise OSError("no such repository\nwith more lines")
    return str(path)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  assert open_tokenizer("some/model").encode(TEXT) == bpe.encode(TEXT)
  assert asked == [("some/model", "tokenizer.json")]
  with pytest.raises(ValueError, match=r"'other/model' .*\(no such repository\): check the name"):
    open_tokenizer("other/model")


@pytest.mark.parametrize(
  "content, words",
  [
    (None, "does not exist"),
    ("{", "is not JSON"),
    ("[]", "holds a list"),
    ('{"model": {}}', "has none of"),
    ('{"model": {"type": "BPE", "vocab": {"</s>": 0}}}', "is not a Hugging Face tokenizer JSON"),
    ('{"kind": "huggingface"}', "not a tokenizer saved by"),
    ('{"kind": "words"}', "kind 'words' is unknown"),
    (b"\xff", "cannot be read"),
    ("[" * 100000, "is not JSON"),
  ],
)
def test_files_that_are_no_tokenizer(content, words, tmp_path):
  if content is not None:
    (tmp_path / "t.json").write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=words) as error:
    open_tokenizer(f"{tmp_path}/t.json")
  assert "t.json" in str(error.value) and "\n" not in str(error.value)


def test_saved_files_and_folders_that_are_broken(tmp_path):
  with pytest.raises(ValueError, match="cannot be read"):
    load_tokenizer(tmp_path / "missing.json")
  with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.json"):
    open_tokenizer(str(tmp_path))
  (tmp_path / "vocab.json").write_text("{}")
  (tmp_path / "merges.txt").write_text("a b c d\n")
  with pytest.raises(ValueError, match="do not fit"):
    open_tokenizer(str(tmp_path))
