import pytest

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data.spec import SourceSpec, parse_sources


def test_one_source_weighs_one():
  assert parse_sources("python-sources") == [SourceSpec("python-sources", "", 1.0)]
  assert parse_sources("text:a/**/*.txt#<|end|>") == [SourceSpec("text", "a/**/*.txt#<|end|>", 1.0)]


def test_mixtures_keep_stars_and_colons_of_their_sources():
  assert parse_sources("0.7*text:a/*.txt + 3e-1*tfds:books/plain:1.0.0@train[:10%]#text") == [
    SourceSpec("text", "a/*.txt", 0.7),
    SourceSpec("tfds", "books/plain:1.0.0@train[:10%]#text", 0.3),
  ]


@pytest.mark.parametrize(
  "text, words",
  [
    ("txet:a", ["'txet:a'", "'txet'", "Did you mean 'text'?"]),
    ("a.txt", ["'a.txt'", "text:GLOB"]),
    ("text:", ["write text:GLOB"]),
    ("python-sources:x", ["write python-sources"]),
    ("0*text:a", ["'0'", "positive"]),
    ("1e*text:a", ["'1e'", "positive"]),
    ("text:a + ", ["''"]),
  ],
)
def test_errors_name_the_part_and_what_is_known(text, words):
  with pytest.raises(ValueError) as error:
    parse_sources(text)
  assert all(word in str(error.value) for word in words), error.value


def test_held_out_sets_are_named_specs_of_which_each_may_be_a_mixture():
  config = DataConfig(held_out_sets="books=0.7*text:a=b/*.txt + 0.3*tokens:c + code-2=jsonl:d#text")
  assert config.named_held_out_sources() == {"books": "0.7*text:a=b/*.txt + 0.3*tokens:c", "code-2": "jsonl:d#text"}
  assert DataConfig().named_held_out_sources() == {}


@pytest.mark.parametrize(
  "sets, words",
  [
    ("text:a + books=text:b", "name the set, as in books=text:a"),
    ("books=", "books= has no source; write books=text:GLOB"),
    ("a=text:a + a=text:b", "'a' names two sets"),
    ("held_out=text:a", "'held_out' is taken"),
    ("train=text:a", "'train' is taken"),
  ],
)
def test_mistakes_in_held_out_sets_are_named(sets, words):
  with pytest.raises(ValueError, match=f"held_out_sets=.*{words}"):
    DataConfig(held_out_sets=sets)
