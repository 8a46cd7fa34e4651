"""BERT's WordPiece as Hugging Face tokenizer.json, from its vocab.txt: one token a line, whose number is its id."""

from collections.abc import Sequence
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def describe(tokens: Sequence[str], *, lower_case: bool = True) -> dict[str, Any]:
  """The parsed tokenizer.json of a vocabulary.

  Args:
    tokens: the token of each id; those that continue a word begin with `##`.
    lower_case: whether text is lower-cased and loses its accents, as for `uncased` models.

  Raises:
    ValueError: a token occurs twice, or a special token is missing.
  """
  vocab = {token: index for index, token in enumerate(tokens)}
  if len(vocab) < len(tokens):
    twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
    raise ValueError(f"the token {twice!r} stands there twice")
  if missing := [token for token in SPECIAL if token not in vocab]:
    raise ValueError(f"it has no {', '.join(missing)}, which a vocabulary of WordPiece has")
  special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
  first, last = ({"id": name, "type_id": 0} for name in ("[CLS]", "[SEP]"))
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": sorted(
      ({"id": vocab[token], "content": token, **special} for token in SPECIAL), key=lambda token: token["id"]
    ),
    "normalizer": {
      "type": "BertNormalizer",
      "clean_text": True,
      "handle_chinese_chars": True,
      "strip_accents": None,
      "lowercase": lower_case,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [{"SpecialToken": first}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": last}],
      "pair": [
        {"SpecialToken": first},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": last},
        {"Sequence": {"id": "B", "type_id": 1}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
      ],
      "special_tokens": {
        token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
      },
    },
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
      "type": "WordPiece",
      "unk_token": "[UNK]",
      "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 100,
      "vocab": vocab,
    },
  }
