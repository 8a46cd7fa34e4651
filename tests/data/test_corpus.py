import numpy as np
import pytest

from tokenformer_jax.data import corpus as corpus_module
from tokenformer_jax.data.corpus import Corpus, Part, key_hash, split, tokenize
from tokenformer_jax.data.documents import Document, DocumentSource
from tokenformer_jax.data.tokenizer import ByteTokenizer


def source(texts, name="books"):
  return DocumentSource(name, lambda bad: (Document(f"{text[:8]}.txt", text) for text in texts))


def corpus_of(lengths, seed=0):
  rng = np.random.default_rng(seed)
  keys = rng.integers(0, 2**64, len(lengths), np.uint64)
  tokens = rng.integers(0, 256, sum(lengths)).astype(np.uint16)
  return Corpus(tokens, np.cumsum(lengths), keys, {}, "random")


def documents_of(part):
  return [part.corpus.tokens[a:b].tobytes() for a, b in part.documents]


@pytest.mark.parametrize("batch_characters", [1, 7, 10**6])
def test_documents_are_laid_end_to_end_with_an_end_id_after_each(batch_characters, monkeypatch):
  monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", batch_characters)
  corpus = tokenize(source(["one", "zwölf", "3"]), ByteTokenizer())
  assert corpus.tokens.tolist() == [*b"one", 256, *"zwölf".encode(), 256, *b"3", 256]
  assert corpus.ends.tolist() == [4, 11, 13]
  assert corpus.keys.tolist() == [key_hash(f"{name}.txt") for name in ("one", "zwölf", "3")]
  assert (corpus.identity["documents"], corpus.identity["bytes"]) == (3, 10)


def test_identity_depends_on_the_text_and_the_names_of_the_files_only():
  def sha(texts, name):
    return tokenize(source(texts, name), ByteTokenizer()).identity["sha256"]

  assert sha(["aa", "b"], "here") == sha(["aa", "b"], "there")
  assert len({sha(texts, "") for texts in (["aa", "b"], ["b", "aa"], ["a", "ab"], ["aab"])}) == 4
  nameless = [
    DocumentSource("", lambda bad, texts=texts: (Document(text, text) for text in texts))
    for texts in (["aa", "b"], ["a", "ab"], ["aab"])
  ]
  assert len({tokenize(s, ByteTokenizer()).identity["sha256"] for s in nameless}) == 3


def test_a_source_without_text_is_refused():
  with pytest.raises(ValueError, match="books holds no text"):
    tokenize(source([]), ByteTokenizer())


def test_whether_a_document_is_held_out_does_not_depend_on_the_others():
  texts = [f"{i} is the number of this text" for i in range(400)]

  def held_out(texts):
    train, held = split(tokenize(source(texts), ByteTokenizer()), 0.2)
    assert sorted(documents_of(train) + documents_of(held)) == sorted(documents_of(Part(train.corpus)))
    return set(documents_of(held))

  everything = held_out(texts)
  assert 50 < len(everything) < 110  # 80 expected, standard deviation 8.
  assert held_out(texts[::-1]) == everything
  some = Part(tokenize(source(texts[:200]), ByteTokenizer()))
  assert held_out(texts[:200]) == everything & set(documents_of(some))


def test_equal_documents_are_in_the_same_part():
  train, held = split(tokenize(source([f"{i % 40} again" for i in range(400)]), ByteTokenizer()), 0.3)
  assert documents_of(held) and not set(documents_of(train)) & set(documents_of(held))


@pytest.mark.parametrize("fraction, sizes", [(1e-9, (2, 1)), (1 - 1e-9, (1, 2))])
def test_both_parts_get_a_document_even_if_hashes_would_give_none(fraction, sizes):
  train, held = split(corpus_of([5, 6, 7]), fraction)
  assert (len(train.documents), len(held.documents)) == sizes


def test_the_tail_of_a_single_document_is_held_out():
  corpus = corpus_of([1000])
  train, held = split(corpus, 0.1)
  assert train.read(0, 900).tolist() == corpus.tokens[:900].tolist() and len(train) == 900
  assert held.read(0, 100).tolist() == corpus.tokens[900:].tolist() and len(held) == 100


def test_a_part_reads_like_its_documents_end_to_end():
  lengths = np.random.default_rng(1).integers(1, 9, 60)
  corpus = corpus_of(lengths)
  chosen = np.random.default_rng(2).random(60) < 0.5
  part = Part(corpus, chosen)
  starts = corpus.ends - lengths
  expected = np.concatenate([corpus.tokens[a:b] for a, b, c in zip(starts, corpus.ends, chosen) if c])
  assert len(part) == len(expected)
  for start in range(0, len(expected), 7):
    for length in (1, 5, len(expected) - start):
      length = min(length, len(expected) - start)
      assert part.read(start, length).tolist() == expected[start : start + length].tolist()
