"""One form for every way in which versions of the `tokenizers` package write the same tokenizer.json.

Releases of the package differ in what they write for one tokenizer: merges as "a b" or ["a", "b"], options that
are at their defaults or left out, the vocabulary in another order. A fingerprint of the file would change with the
release; the fingerprint of this form does not. The form is the one that tokenizers 0.20 to 0.23 write.
"""

from typing import Any

# The options that a component may leave out, with the values that the package then takes.
_MODEL_DEFAULTS = {
  "BPE": {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
  },
  "Unigram": {"unk_id": None, "byte_fallback": False},
}
_COMPONENT_DEFAULTS = {
  "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
  "Metaspace": {"split": True},
}
_TOKEN_DEFAULTS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def canonical(description: dict[str, Any]) -> dict[str, Any]:
  """The canonical form of a parsed tokenizer.json, without its truncation and padding.

  Args:
    description: the parsed file, as any release of the `tokenizers` package wrote it.

  Returns:
    A new dictionary; two files of one tokenizer give equal ones. Components that are unknown here stay as they are.
  """
  tokens = [_TOKEN_DEFAULTS | token for token in description.get("added_tokens") or ()]
  return {
    **description,
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": sorted(tokens, key=lambda token: token["id"]),
    "model": _model(description["model"]),
    **{part: _component(description.get(part)) for part in _PARTS},
  }


def _model(model: dict[str, Any]) -> dict[str, Any]:
  kind = model.get("type") or _model_type(model)
  model = {"type": kind, **_MODEL_DEFAULTS.get(kind, {}), **model}
  if kind == "BPE":
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
      model[affix] = model[affix] or None  # An empty affix changes no token.
  return model


def _model_type(model: dict[str, Any]) -> str:
  """The type of a model that does not name its own, as files from before 2021 do not."""
  if "merges" in model:
    return "BPE"
  if isinstance(model.get("vocab"), list):
    return "Unigram"
  return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _component(component: Any) -> Any:
  """A normalizer, pre-tokenizer, post-processor or decoder, or a list of some."""
  if isinstance(component, list):
    return [_component(item) for item in component]
  if not isinstance(component, dict) or "type" not in component:
    return component
  kind = component["type"]
  component = {**_COMPONENT_DEFAULTS.get(kind, {}), **{key: _component(value) for key, value in component.items()}}
  if kind == "Metaspace":
    # Until 0.14 the option was `add_prefix_space`, and `str_rep` repeated the replacement.
    prefix = component.pop("add_prefix_space", True)
    component.pop("str_rep", None)
    component.setdefault("prepend_scheme", "always" if prefix else "never")
  return component
