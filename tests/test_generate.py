"""Generation: the tokens of a loop of full forwards, and all that ends, cuts or refuses a text."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.inference.continuation import Continuation
from tokenformer_jax.inference.generate import bucket, generate
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.models.language_model import LanguageModel

END = 256


class Bytes:
  """Bytes as ids, 256 ends a document."""

  vocab_size = 257
  end_of_document = END

  def encode(self, text):
    return list(text.encode("utf-8"))

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(
    vocab_size=384,
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    qkv_tokens=16,
    proj_tokens=16,
    ffn_tokens=32,
    seq_length=64,
  )
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  # Far from its initial state, so that texts vary and the context counts.
  model.blocks = jax.tree.map(lambda x: 8.0 * x if x.ndim == 3 else x, model.blocks)
  model.embedding[...] = 20.0 * model.embedding[...]
  return model


def test_greedy_text_is_that_of_full_forwards(model):
  prompts = ["é", "a longer prompt"]
  forward = jax.jit(model)
  expected = []
  for prompt in prompts:
    ids = list(prompt.encode("utf-8"))
    for _ in range(20):
      padded = np.zeros((1, 64), np.int32)
      padded[0, : len(ids)] = ids
      ids.append(int(np.argmax(np.asarray(forward(padded))[0, len(ids) - 1, :257])))
    written = ids[-20:]
    written = written[: written.index(END)] if END in written else written
    expected.append(bytes(written).decode("utf-8", errors="replace"))
  assert generate(model, Bytes(), prompts, max_new_tokens=20, temperature=0) == expected
  assert len(set(expected)) == 2


def test_a_prompt_gives_the_same_text_alone_in_a_batch_and_as_ids(model):
  def written(prompts, max_new_tokens=24, seed=3):
    return generate(model, Bytes(), prompts, max_new_tokens=max_new_tokens, temperature=1.5, seed=seed)

  alone = written("abc")
  assert len(alone) == 1 and alone[0] == written(["abc", "a longer prompt"])[0]
  assert written([np.array([97, 98, 99])]) == alone
  assert written("abc", seed=4) != alone
  # Fewer tokens are the beginning of more, whatever they are compiled for.
  short = written("abc", max_new_tokens=6)
  assert alone[0].startswith(short[0].rstrip("\ufffd"))


def test_a_sharded_model_writes_the_same_text(model, tmp_path):
  written = dict(prompts=["abc", "defghi"], max_new_tokens=20)
  path = export(model, tmp_path).path
  sharded = from_pretrained(path, mesh=make_mesh(MeshConfig(token=4, fsdp=2)))
  assert len(sharded.embedding[...].sharding.device_set) == 8
  for settings in (dict(temperature=0), dict(temperature=1.5, seed=3)):
    settings |= written
    assert generate(sharded, Bytes(), **settings) == generate(model, Bytes(), **settings)


def test_every_token_is_a_new_draw(model):
  # So hot that the logits hardly count: the same draw again and again would be the same byte.
  text = generate(model, Bytes(), "abc", max_new_tokens=40, temperature=1e4)[0]
  assert len(set(text)) > 10


def test_nothing_is_compiled_twice_in_a_bucket(model, monkeypatch):
  traced = []
  into = LanguageModel._into
  monkeypatch.setattr(
    LanguageModel,
    "_into",
    lambda self, cache, tokens, *how: (traced.append((tokens.shape, cache.num_slots)), into(self, cache, tokens, *how))[
      1
    ],
  )
  config = ModelConfig.named("tiny", vocab_size=300, num_layers=1)
  requests = [
    dict(prompts="abc", max_new_tokens=5),
    dict(prompts="abcdefg", max_new_tokens=9),
    dict(prompts="ab", max_new_tokens=4, temperature=0),
    dict(prompts="ab", max_new_tokens=4, top_k=5, top_p=0.5, stop="x"),
  ]
  for seed, settings in enumerate(requests):
    # A new model each time: what is compiled belongs to the shapes and not to the weights.
    fresh = LanguageModel(config, rngs=nnx.Rngs(seed))
    generate(fresh, Bytes(), **settings, seed=seed)
  assert traced == [((1, 16), 32), ((1, 1), 32)]
  generate(fresh, Bytes(), "ab" * 10, max_new_tokens=4)
  assert traced[2:] == [((1, 32), 64), ((1, 1), 64)]


def test_buckets():
  assert [bucket(n) for n in (1, 16, 17, 64, 128, 129, 2048)] == [16, 16, 32, 64, 128, 256, 2048]


def test_padding_ids_are_never_written(model, monkeypatch):
  logits = LanguageModel.logits
  monkeypatch.setattr(LanguageModel, "logits", lambda self, hidden: logits(self, hidden).at[..., 257:].add(1e4))
  # Another size, so that nothing compiled before is used.
  fresh = LanguageModel(ModelConfig.named("tiny", vocab_size=320, num_layers=1), rngs=nnx.Rngs(0))
  ids = []

  class Recording(Bytes):
    def decode(self, new):
      ids.append(new[-1])
      return ""

  for temperature in (0.0, 5.0):
    generate(fresh, Recording(), ["a", "b"], max_new_tokens=20, temperature=temperature)
  assert len(ids) > 20 and max(ids) < 257


def streamed(model, prompts, **settings):
  pieces = [[] for _ in prompts]
  texts = generate(model, Bytes(), prompts, stream=lambda row, piece: pieces[row].append(piece), **settings)
  return texts, pieces


def test_streaming_gives_the_same_text_in_whole_characters(model):
  settings = dict(max_new_tokens=40, temperature=1.2, seed=1)
  prompts = ["naïve", "第"]
  texts, pieces = streamed(model, prompts, **settings)
  assert texts == generate(model, Bytes(), prompts, **settings)
  assert ["".join(row) for row in pieces] == texts
  assert max(map(len, pieces)) > 5


class Words(Bytes):
  """Ids of whole words."""

  def decode(self, ids):
    return "".join(("so; that. ", "and. so; on ")[i] for i in ids)


def continued(*tokens, stop=(), last=True, tokenizer=Bytes()):
  """The pieces of a text whose tokens are given, and its continuation."""
  row = Continuation(tokenizer, stop)
  pieces = []
  for index, token in enumerate(tokens):
    row.read(token)
    pieces.append(row.piece(last=last and index == len(tokens) - 1))
  return pieces, row


def test_a_character_is_streamed_when_it_is_whole():
  pieces, row = continued(*"aé€😀".encode())
  assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]
  assert row.text == "aé€😀"
  # Bytes that never become a character come out as what decode makes of them.
  pieces, row = continued(0xE2, 0x82, ord("x"), 0xFF, 0xFF, 0xFF, 0xFF, 0xFF)
  assert "".join(pieces) == row.text == b"\xe2\x82x\xff\xff\xff\xff\xff".decode(errors="replace")
  assert pieces == ["", "", "\ufffdx", "", "", "", "\ufffd", 4 * "\ufffd"]
  # A character cut by the last token is written as decode writes it.
  assert continued(0xE2, 0x82)[0] == ["", "\ufffd"]


class Counting(Bytes):
  """How many ids it was given."""

  def __init__(self):
    self.count = 0

  def decode(self, ids):
    self.count += len(ids)
    return super().decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_is_that_of_all_its_tokens(seed):
  rng = np.random.default_rng(seed)
  characters = rng.choice(["a", "é", "€", "😀", "\ufffd"], 150)
  tokens = list("".join(characters).encode())
  for position in rng.integers(0, len(tokens), 10 * seed):  # Bytes of no character.
    tokens[position] = int(rng.integers(128, 256))
  tokenizer = Counting()
  pieces, row = continued(*tokens, tokenizer=tokenizer)
  assert "".join(pieces) == row.text == bytes(tokens).decode(errors="replace")
  # A token costs the same however long the text is.
  assert tokenizer.count < 100 * len(tokens) < len(tokens) ** 2 / 3


def test_a_stop_string_ends_the_text_and_never_shows():
  pieces, row = continued(*b"one\n\n", *b"two", stop=("\n\n",))
  assert (row.text, row.done) == ("one", True)
  assert pieces == ["o", "n", "e", "", "", "", "", ""]
  # What only begins like one is text after all, also at the end.
  pieces, row = continued(*b"a\nb\n", stop=("\n\n",))
  assert pieces == ["a", "", "\nb", "\n"] and not row.done
  # The first to occur counts, whatever their order, also where one token brings several.
  for stop in ((".", ";"), (";", ".")):
    assert continued(0, tokenizer=Words(), stop=stop)[1].text == "so"
    assert continued(1, tokenizer=Words(), stop=stop)[1].text == "and"
  # One may hang on a character that is not whole yet.
  pieces, row = continued(*"xEéz".encode(), stop=("Eéz",))
  assert (pieces, row.text) == (["x", "", "", "", ""], "x")


def test_an_end_of_document_ends_the_text():
  pieces, row = continued(97, 0xC3, END, 98, last=False)
  assert (row.text, row.done) == ("a\ufffd", True)
  assert pieces == ["a", "", "\ufffd", ""]


def test_generation_stops_when_every_row_has_ended(model, monkeypatch):
  settings = dict(max_new_tokens=40, temperature=1.2, seed=1)
  texts, _ = streamed(model, ["one", "two"], **settings)
  stop = [text[4:6] for text in texts]
  cut, pieces = streamed(model, ["one", "two"], stop=stop, **settings)
  for text, whole, row in zip(cut, texts, pieces):
    assert text == whole[: min(whole.find(s) for s in stop if s in whole)] == "".join(row)
  reads = []
  read = Continuation.read
  monkeypatch.setattr(Continuation, "read", lambda self, token: (reads.append(token), read(self, token)))
  generate(model, Bytes(), ["one", "two"], stop=stop, **settings)
  assert len(reads) < 2 * 40


@pytest.mark.parametrize(
  "prompts, settings, message",
  [
    ([], {}, r"prompts=\[\]"),
    ("", {}, "prompt 0 is empty"),
    (["a", []], {}, "prompt 1 is empty"),
    ([5], {}, "prompt 0 is 5: expected a text or a list of token ids"),
    ([[1, 2], [3, 257]], {}, "prompt 1: id 257 at position 1 is outside the vocabulary; ids are 0 to 256"),
    ([[-1]], {}, "prompt 0: id -1 at position 0"),
    ([[2**40]], {}, "prompt 0: id 1099511627776 at position 0"),
    ([[1.0]], {}, "prompt 0: id 1.0 at position 0"),
    ("a" * 60, {}, "prompt 0 has 60 tokens and max_new_tokens=5: together they may be 64"),
    ("a", dict(max_new_tokens=64), "prompt 0 has 1 tokens and max_new_tokens=64"),
    ("a", dict(max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
    ("a", dict(max_new_tokens=2.0), "max_new_tokens=2.0: must be a whole number"),
    ("a", dict(temperature=-1.0), "temperature=-1.0"),
    ("a", dict(top_p=0.0), "top_p=0.0"),
    ("a", dict(top_k=-1), "top_k=-1"),
    ("a", dict(stop=("x", "")), "stop=''"),
  ],
)
def test_a_bad_request_is_refused(model, prompts, settings, message):
  with pytest.raises(ValueError, match=message):
    generate(model, Bytes(), prompts, **{"max_new_tokens": 5, **settings})


def test_another_models_tokenizer_is_refused(model):
  class Larger(Bytes):
    vocab_size = 385

  with pytest.raises(ValueError, match="tokenizer with 385 ids, model with vocab_size=384"):
    generate(model, Larger(), "a", max_new_tokens=1)


def test_the_longest_request_that_fits(model):
  texts = generate(model, Bytes(), [[97] * 60, [97]], max_new_tokens=4, temperature=0)
  assert texts[1] == generate(model, Bytes(), [[97]], max_new_tokens=4, temperature=0)[0]


def door(*arguments):
  command = [sys.executable, "-m", "tokenformer_jax.cli.generate", *arguments]
  return subprocess.run(command, capture_output=True, cwd=pathlib.Path(__file__).parent.parent, check=False)


def test_the_door_streams_what_generate_returns(model, tmp_path):
  export(model, tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"kind": "bytes"}')
  done = door(f"--pretrained={tmp_path}", "--prompt=naïve", "--max_new_tokens=30", "--temperature=1.2", "--seed=7")
  assert done.returncode == 0, done.stderr
  text = generate(model, Bytes(), "naïve", max_new_tokens=30, temperature=1.2, seed=7)[0]
  assert done.stdout.decode("utf-8") == f"naïve{text}\n"


def test_the_door_wants_one_model():
  done = door("--prompt=a")
  assert (done.returncode, done.stdout) == (2, b"")
  assert done.stderr == b"error: give either --workdir or --pretrained.\n"
