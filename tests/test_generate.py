"""Generation gives the tokens of a loop of full forward passes; texts end, are cut and are refused as documented."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from tests.commands import call
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.data import save_tokenizer
from tokenformer_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.inference.continuation import Continuation
from tokenformer_jax.inference.decoding import bucket, draw, slots
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.models.decoding_model import DecodingModel
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.cache import KVCache

END = 256


class Bytes:
  """A tokenizer of bytes; id 256 ends a document."""

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
  # The parameters are scaled up from their initial size, so that texts vary and depend on the context.
  model.blocks = jax.tree.map(lambda x: 8.0 * x if x.ndim == 3 else x, model.blocks)
  model.embedding[...] = 20.0 * model.embedding[...]
  return model


def test_greedy_text_equals_that_of_full_forward_passes(model):
  prompts = ["é", "a longer prompt"]
  forward = jax.jit(model)
  expected = []
  for prompt in prompts:
    ids = list(prompt.encode("utf-8"))
    for _ in range(20):
      padded = np.zeros((1, 64), np.int32)
      padded[0, : len(ids)] = ids
      ids.append(int(np.argmax(np.asarray(forward(padded))[0, len(ids) - 1, :257])))
    generated = ids[-20:]
    generated = generated[: generated.index(END)] if END in generated else generated
    expected.append(bytes(generated).decode("utf-8", errors="replace"))
  assert generate(model, Bytes(), prompts, max_new_tokens=20, temperature=0) == expected
  assert len(set(expected)) == 2


def test_a_prompt_gives_the_same_text_alone_in_a_batch_and_as_ids(model):
  def written(prompts, max_new_tokens=24, seed=3):
    return generate(model, Bytes(), prompts, max_new_tokens=max_new_tokens, temperature=1.5, seed=seed)

  alone = written("abc")
  assert len(alone) == 1 and alone[0] == written(["abc", "a longer prompt"])[0]
  assert written([np.array([97, 98, 99])]) == alone
  assert written("abc", seed=4) != alone
  # A shorter continuation is the beginning of a longer one, although other programs compute it.
  short = written("abc", max_new_tokens=6)
  assert alone[0].startswith(short[0].rstrip("\ufffd"))


def test_a_sharded_model_generates_the_same_text(model, tmp_path):
  written = dict(prompts=["abc", "defghi"], max_new_tokens=20)
  path = export(model, tmp_path).path
  sharded = from_pretrained(path, mesh=make_mesh(MeshConfig(token=4, fsdp=2)))
  assert len(sharded.embedding[...].sharding.device_set) == 8
  for settings in (dict(temperature=0), dict(temperature=1.5, seed=3, repetition_penalty=1.2)):
    settings |= written
    assert generate(sharded, Bytes(), **settings) == generate(model, Bytes(), **settings)


def test_every_token_is_a_new_draw(model):
  # At this temperature all bytes are about equally likely, and repeating one draw would repeat one byte.
  text = generate(model, Bytes(), "abc", max_new_tokens=40, temperature=1e4)[0]
  assert len(set(text)) > 10


def test_nothing_is_compiled_twice_in_a_bucket(model, monkeypatch):
  traced, draws = [], []
  through_layers = DecodingModel._through_layers

  def recording(self, tokens, context, cache):
    traced.append((tokens.shape, cache.num_slots))
    return through_layers(self, tokens, context, cache)

  monkeypatch.setattr(DecodingModel, "_through_layers", recording)
  config = ModelConfig.named("tiny", vocab_size=300, num_layers=1)
  requests = [
    dict(prompts="abc", max_new_tokens=5),
    dict(prompts="abcdefg", max_new_tokens=9),
    dict(prompts="ab", max_new_tokens=4, temperature=0),
    dict(prompts="ab", max_new_tokens=4, top_k=5, top_p=0.5, repetition_penalty=1.5, stop="x"),
  ]
  for seed, settings in enumerate(requests):
    # Each request has a new model, because a compiled program belongs to the shapes and not to the weights.
    fresh = LanguageModel(config, rngs=nnx.Rngs(seed))
    generate(fresh, Bytes(), **settings, seed=seed)
    draws.append(draw._cache_size())
  assert len(set(draws)) == 1
  assert traced == [((1, 16), 32), ((1, 1), 32)]
  generate(fresh, Bytes(), "ab" * 10, max_new_tokens=4)
  assert traced[2:] == [((1, 32), 64), ((1, 1), 64)]


def test_a_cache_that_doubles_gives_the_text_of_one_that_has_all_slots(model, monkeypatch):
  prompts, settings = ["abc", "longer words"], dict(max_new_tokens=30, temperature=1.5, seed=2)
  at_once = generate(model, Bytes(), prompts, **settings)
  sizes, with_slots = [], KVCache.with_slots

  def recording(self, num_slots):
    sizes.append((int(self.length), self.num_slots, num_slots))
    return with_slots(self, num_slots)

  monkeypatch.setattr(KVCache, "with_slots", recording)
  monkeypatch.setattr("tokenformer_jax.inference.decoding._LEAST_SLOTS", 8)
  assert generate(model, Bytes(), prompts, **settings) == at_once
  assert sizes == [(32, 32, 64)]


def test_slots():
  assert [slots(n, 2048) for n in (1, 256, 257, 513, 2048)] == [256, 256, 512, 1024, 2048]
  assert (slots(17, 32), slots(640, 896), slots(896, 896)) == (32, 896, 896)


def test_buckets():
  assert [bucket(n) for n in (1, 16, 17, 64, 128, 129, 2048)] == [16, 16, 32, 64, 128, 256, 2048]


def test_padding_ids_are_never_generated(model, monkeypatch):
  logits = DecodingModel.logits
  monkeypatch.setattr(DecodingModel, "logits", lambda self, hidden: logits(self, hidden).at[..., 257:].add(1e4))
  # A model of another size, so that no program compiled before is used.
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


def test_streaming_gives_the_same_text(model):
  settings = dict(max_new_tokens=40, temperature=1.2, seed=1)
  prompts = ["naïve", "第"]
  texts, pieces = streamed(model, prompts, **settings)
  assert texts == generate(model, Bytes(), prompts, **settings)
  assert ["".join(row) for row in pieces] == texts
  assert max(map(len, pieces)) > 5


class Phrases(Bytes):
  """A tokenizer whose ids are phrases."""

  def decode(self, ids):
    return "".join(("so; that. ", "and. so; on ")[i] for i in ids)


def continued(*tokens, stop=(), last=True, tokenizer=Bytes(), prompt=()):
  """The streamed pieces of these tokens, and their continuation."""
  row = Continuation(tokenizer, stop, prompt)
  pieces = []
  for index, token in enumerate(tokens):
    row.read(token)
    pieces.append(row.piece(last=last and index == len(tokens) - 1))
  return pieces, row


def test_a_character_is_streamed_when_it_is_whole():
  pieces, row = continued(*"aé€😀".encode())
  assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]
  assert row.text == "aé€😀"
  # Bytes that never become a character are streamed as decode renders them.
  pieces, row = continued(0xE2, 0x82, ord("x"), 0xFF, 0xFF, 0xFF, 0xFF, 0xFF)
  assert "".join(pieces) == row.text == b"\xe2\x82x\xff\xff\xff\xff\xff".decode(errors="replace")
  assert pieces == ["", "", "\ufffdx", "", "", "", "\ufffd", 4 * "\ufffd"]
  # A character cut by the last token is streamed as decode renders it.
  assert continued(0xE2, 0x82)[0] == ["", "\ufffd"]


class Counting(Bytes):
  """A tokenizer that counts the ids that it decodes."""

  def __init__(self):
    self.count = 0

  def decode(self, ids):
    self.count += len(ids)
    return super().decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_equals_the_decoding_of_all_its_tokens(seed):
  rng = np.random.default_rng(seed)
  characters = rng.choice(["a", "é", "€", "😀", "\ufffd"], 150)
  tokens = list("".join(characters).encode())
  for position in rng.integers(0, len(tokens), 10 * seed):  # Bytes that belong to no character.
    tokens[position] = int(rng.integers(128, 256))
  tokenizer = Counting()
  pieces, row = continued(*tokens, tokenizer=tokenizer)
  assert "".join(pieces) == row.text == bytes(tokens).decode(errors="replace")
  # The cost of a token does not depend on the length of the text.
  assert tokenizer.count < 100 * len(tokens) < len(tokens) ** 2 / 3


def test_a_stop_string_ends_the_text_and_is_left_out():
  pieces, row = continued(*b"one\n\n", *b"two", stop=("\n\n",))
  assert (row.text, row.done) == ("one", True)
  assert pieces == ["o", "n", "e", "", "", "", "", ""]
  # Text that only begins like a stop string is streamed later, at the latest with the last token.
  pieces, row = continued(*b"a\nb\n", stop=("\n\n",))
  assert pieces == ["a", "", "\nb", "\n"] and not row.done
  # The stop string that occurs first counts, whatever the order of the arguments, also where a token contains several.
  for stop in ((".", ";"), (";", ".")):
    assert continued(0, tokenizer=Phrases(), stop=stop)[1].text == "so"
    assert continued(1, tokenizer=Phrases(), stop=stop)[1].text == "and"
  # A stop string may depend on a character that is not complete yet.
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
    (["a", []], {}, "prompt 1 has no ids"),
    (["a", "\ud800"], {}, "prompt 1: .*surrogates not allowed"),
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
    ("a", dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
    ("a", dict(stop=("x", "")), "stop=''"),
  ],
)
def test_a_bad_request_is_refused(model, prompts, settings, message):
  with pytest.raises(ValueError, match=message):
    generate(model, Bytes(), prompts, **{"max_new_tokens": 5, **settings})


def test_another_models_tokenizer_is_refused(model):
  class Larger(Bytes):
    vocab_size = 385

  with pytest.raises(ValueError, match="tokenizer has 385 ids and the model vocab_size=384"):
    generate(model, Larger(), "a", max_new_tokens=1)


def test_the_longest_request_that_fits_is_accepted(model):
  texts = generate(model, Bytes(), [[97] * 60, [97]], max_new_tokens=4, temperature=0)
  assert texts[1] == generate(model, Bytes(), [[97]], max_new_tokens=4, temperature=0)[0]


class Words:
  """A tokenizer that, like WordPiece and Metaspace, writes a space before each word but not before a text."""

  vocab_size = 4
  end_of_document = 3

  def decode(self, ids):
    return "".join((" the", " cat", "s", "")[i] for i in ids)[1:]


def test_a_word_after_the_prompt_keeps_its_space():
  pieces, row = continued(1, 2, 0, tokenizer=Words(), prompt=[0, 0])
  assert (row.text, pieces) == (" cats the", [" cat", "s", " the"])
  # A suffix has no space, and an end of document ends the context.
  assert continued(2, tokenizer=Words(), prompt=[1])[1].text == "s"
  assert continued(1, tokenizer=Words(), prompt=[0, 3])[1].text == "cat"
  # The text is that of all tokens also when the context is longer than the window of the decoder.
  prompt, tokens = 50 * [0, 1], 70 * [0, 1, 2]
  assert "the" + continued(*tokens, tokenizer=Words(), prompt=prompt)[1].text == Words().decode([0, *tokens])


def test_a_character_that_the_prompt_begins_is_completed():
  prompt, rest = list("né".encode())[:-1], list("é!".encode())[1:]
  assert continued(*rest, prompt=prompt)[0] == ["é", "!"]
  # Where the continuation does not complete it, the prompt's text has shown it as broken already.
  assert continued(ord("x"), prompt=prompt)[0] == ["x"]


def test_generate_joins_prompt_and_continuation_as_the_text_of_all_tokens(model):
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({"[UNK]": 0, "</s>": 1, "the": 2, "cat": 3, "##s": 4}, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.decoder = tokenizers.decoders.WordPiece()
  words = HuggingFaceTokenizer(json.loads(tokenizer.to_str()), "</s>")
  pieces = []
  (result,) = generate(
    model,
    words,
    "the cats",
    max_new_tokens=20,
    temperature=5.0,
    seed=1,
    stream=lambda row, piece: pieces.append(piece),
    return_log_probs=True,
  )
  ids = [i for i in result.ids if i != words.end_of_document]
  assert "the cats" + result.text == words.decode([*words.encode("the cats"), *ids])
  assert "".join(pieces) == result.text and result.text.startswith(" ")


def test_an_empty_text_begins_a_document(model):
  settings = dict(max_new_tokens=10, temperature=1.5)
  assert generate(model, Bytes(), ["", "a"], **settings) == generate(model, Bytes(), [[END], "a"], **settings)


def test_a_decoding_model_generates_what_its_model_does(model):
  settings = dict(prompts="abc", max_new_tokens=5)
  assert generate(model.for_decoding(), Bytes(), **settings) == generate(model, Bytes(), **settings)


@pytest.mark.parametrize("broken", ["embedding", "blocks"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_model_with_broken_parameters_is_refused(model, broken, number):
  model = nnx.clone(model)
  if broken == "embedding":
    model.embedding[...] = model.embedding[...].at[98].set(number)
  else:
    model.blocks.ffn.values[...] = model.blocks.ffn.values[...].at[-1, 0, 0].set(number)
  with pytest.raises(
    ValueError, match="the model's logits after prompt 0 are not finite: .*load an earlier checkpoint"
  ):
    generate(model, Bytes(), ["a", "c"], max_new_tokens=2)


def test_padding_ids_may_have_any_parameters(model):
  broken = nnx.clone(model)
  broken.embedding[...] = broken.embedding[...].at[300].set(np.nan)
  settings = dict(prompts="abc", max_new_tokens=5)
  assert generate(broken, Bytes(), **settings) == generate(model, Bytes(), **settings)


def test_log_probs_are_those_of_a_full_forward_pass(model):
  """They do not depend on the settings of the draw, and end with the continuation."""
  prompts = ["naïve", "b"]
  settings = dict(max_new_tokens=12, temperature=1.7, top_k=20, repetition_penalty=1.3, seed=1)
  results = generate(model, Bytes(), prompts, **settings, return_log_probs=True)
  assert [result.text for result in results] == generate(model, Bytes(), prompts, **settings)
  for prompt, result in zip(prompts, results):
    ids = [*Bytes().encode(prompt), *result.ids]
    logits = np.asarray(jax.jit(model)(np.resize(ids, (1, 64)).astype(np.int32)), np.float64)[0, :, :257]
    expected = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    expected = [expected[position - 1, ids[position]] for position in range(len(ids) - len(result.ids), len(ids))]
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)
  # The first row ends while the second continues.
  cut, longer = generate(model, Bytes(), prompts, **settings, stop=results[0].text[3:5], return_log_probs=True)
  assert len(longer.ids) == 12
  assert cut.ids == results[0].ids[: len(cut.ids)] and 0 < len(cut.ids) < 12
  assert cut.log_probs == pytest.approx(results[0].log_probs[: len(cut.ids)], abs=1e-5)


def test_the_repetition_penalty_concerns_the_prompt_and_the_continuation(model):
  """A penalty this high allows each byte once, and none that the prompt has."""
  prompt = bytes(range(97, 107)).decode()
  (result,) = generate(
    model, Bytes(), prompt, max_new_tokens=40, temperature=0, repetition_penalty=1e6, return_log_probs=True
  )
  ids = [*Bytes().encode(prompt), *result.ids]
  assert len(set(ids)) == len(ids) > 30


def test_the_cli_streams_what_generate_returns(model, tmp_path):
  export(model, tmp_path / "run")
  save_tokenizer(ByteTokenizer(), tmp_path / "run" / "tokenizer.json")
  settings = dict(max_new_tokens=30, temperature=1.2, seed=7, repetition_penalty=1.1)
  code, text, said = call(
    "generate",
    "--pretrained=~/run",
    "--tokenizer=~/run/tokenizer.json",
    "--prompt=naïve",
    "--log_probs",
    *(f"--{name}={value}" for name, value in settings.items()),
    HOME=str(tmp_path),
  )
  assert code == 0, said
  (result,) = generate(model, Bytes(), "naïve", **settings, return_log_probs=True)
  assert text == f"naïve{result.text}\n"
  assert said == [f"log-probability: {sum(result.log_probs):.3f} nats over {len(result.ids)} tokens"]


def test_the_cli_names_the_prompt_that_it_cannot_continue(model, tmp_path):
  export(model, tmp_path)
  code, text, said = call(
    "generate",
    f"--pretrained={tmp_path}",
    "--tokenizer=bytes",
    "--max_new_tokens=5",
    "--prompt=",
    f"--prompt={'a' * 64}",
  )
  assert (code, text) == (2, "")
  assert said == [
    "error: prompt 1 has 64 tokens and max_new_tokens=5: together they may be 64 (seq_length); shorten the prompt or "
    "ask for fewer."
  ]


def test_the_cli_requires_one_model():
  assert call("generate", "--prompt=a") == (2, "", ["error: workdir=None, pretrained=None: give exactly one of them."])
