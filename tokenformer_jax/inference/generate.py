"""Text generation: requests are checked, and drawn tokens become texts that end and may be streamed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np

from tokenformer_jax.inference.continuation import Continuation
from tokenformer_jax.inference.decoding import decode
from tokenformer_jax.inference.sampling import Sampling, checked_int
from tokenformer_jax.inference.speculative import check_draft, speculate
from tokenformer_jax.models.decoding_model import DecodingModel
from tokenformer_jax.models.language_model import LanguageModel

Prompts = str | Sequence[str | Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Generated:
  """A continuation with its tokens.

  Attributes:
    text: what `generate` returns without `return_log_probs`.
    ids: the tokens that were drawn until the continuation ended, among them an end of document and the tokens of a
      stop string, which the text leaves out.
    log_probs: the log-probability of each token, in nats, given the prompt and the tokens before it. It is the
      model's own, at temperature 1 and over all ids of the tokenizer, before penalty, top_k and top_p.
  """

  text: str
  ids: tuple[int, ...]
  log_probs: tuple[float, ...]


@overload
def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = ...,
  top_k: int = ...,
  top_p: float = ...,
  repetition_penalty: float = ...,
  seed: int = ...,
  stop: str | Sequence[str] = ...,
  stream: Callable[[int, str], None] | None = ...,
  draft: LanguageModel | DecodingModel | None = ...,
  draft_tokens: int = ...,
  return_log_probs: Literal[False] = ...,
) -> list[str]: ...


@overload
def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = ...,
  top_k: int = ...,
  top_p: float = ...,
  repetition_penalty: float = ...,
  seed: int = ...,
  stop: str | Sequence[str] = ...,
  stream: Callable[[int, str], None] | None = ...,
  draft: LanguageModel | DecodingModel | None = ...,
  draft_tokens: int = ...,
  return_log_probs: Literal[True],
) -> list[Generated]: ...


def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  repetition_penalty: float = 1.0,
  seed: int = 0,
  stop: str | Sequence[str] = (),
  stream: Callable[[int, str], None] | None = None,
  draft: LanguageModel | DecodingModel | None = None,
  draft_tokens: int = 4,
  return_log_probs: bool = False,
) -> list[str] | list[Generated]:
  """Continues all prompts together and returns the continuations without their prompts.

  A continuation ends before the first stop string, at an end of document, or after `max_new_tokens`. Prompt +
  continuation is the text as it reads, also for tokenizers that write no space before the first word of a text. Each
  call begins with `model.for_decoding()`; a program that calls often makes that copy once and passes it as the model.
  Programs are compiled for each number of prompts, and for lengths rounded up to 16, 32, 64 or a multiple of 128, so
  that most calls compile nothing. From 256 tokens on the cache doubles when it is full, and one decode step is compiled
  for each size.

  Args:
    model: a language model, or its `for_decoding()`.
    tokenizer: has `encode(text) -> ids`, `decode(ids) -> text`, `vocab_size` and `end_of_document`. Only ids below its
      `vocab_size` are drawn; the model's other ids are padding.
    prompts: texts, or lists of token ids; a single text is a list of one. Lengths may differ. An empty text begins a
      document.
    max_new_tokens: the most tokens to generate for each prompt, at least 1.
    temperature: 0 takes the likeliest token; higher temperatures are freer.
    top_k: draws from the k likeliest tokens; 0 draws from all.
    top_p: draws from the fewest likeliest tokens whose probabilities sum to this; 1 draws from all.
    repetition_penalty: divides the positive logits of ids that the prompt or the continuation has, and multiplies the
      negative ones, as in Hugging Face's library; 1 changes nothing.
    seed: a whole number from 0 on. The same seed gives the same text, and the text of a row does not depend on the
      other rows.
    stop: a string or strings that end a continuation.
    stream: called as `stream(row, piece)` whenever more of a row's text is final. The joined pieces of a row are its
      continuation, and none ends inside a character or inside a stop string.
    draft: a smaller model with the same tokenizer, which drafts tokens that `model` checks (`inference.speculative`). The
      texts have the same distribution as without it, and at temperature 0 they are the same; drawn texts are others,
      and depend on the other rows.
    draft_tokens: how many tokens are drafted at a time.
    return_log_probs: return the tokens and their log-probabilities too.

  Returns:
    The text of each continuation; with `return_log_probs` a `Generated` for each.

  Raises:
    ValueError: an empty list of ids, an id outside the vocabulary, a prompt that is longer than the model's
      `seq_length` together with the new tokens, a setting out of range, another model's tokenizer, an encoder, a model
      whose logits are not finite, or a draft model that does not fit.
  """
  for name, given in (("model", model), ("draft", draft)):
    if not hasattr(given, "for_decoding") and (name, given) != ("draft", None):
      raise ValueError(
        f"{name} is a {type(given).__name__}: an encoder reads what stands behind a token and generates no text; give a "
        "LanguageModel (task='next_token')."
      )
  config = model.config
  if not 1 <= tokenizer.vocab_size <= config.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids and the model vocab_size={config.vocab_size}: this is another "
      "model's tokenizer; load the one saved with the model."
    )
  max_new_tokens = checked_int("max_new_tokens", max_new_tokens, 1, "the most tokens to generate")
  sampling = Sampling.checked(
    vocab_size=tokenizer.vocab_size,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    repetition_penalty=repetition_penalty,
    seed=seed,
  )
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  if "" in stop:
    raise ValueError("stop='': an empty string would end every text at once; leave it out.")
  seq_length = config.seq_length
  if draft is not None:
    draft_tokens = checked_int("draft_tokens", draft_tokens, 1, "the tokens drafted at a time")
    check_draft(config, draft.config, tokenizer.vocab_size)
    seq_length = min(seq_length, draft.config.seq_length)
    if repetition_penalty != 1:
      raise ValueError(
        f"repetition_penalty={repetition_penalty} with a draft: only 1 is supported; leave one of them out."
      )
  ids_of_prompts = _checked_ids(tokenizer, prompts, seq_length, max_new_tokens)
  rows = [Continuation(tokenizer, stop, ids) for ids in ids_of_prompts]
  drawn: list[list[tuple[int, float]]] = [[] for _ in rows]

  if draft is None:
    steps = decode(model, ids_of_prompts, max_new_tokens, sampling, return_log_probs)
  else:
    steps = speculate(
      model, draft, ids_of_prompts, max_new_tokens, sampling, draft_tokens, lambda: [row.done for row in rows]
    )
  for index, (tokens_B, log_probs_B) in enumerate(steps, start=1):
    for row, (token, log_prob) in enumerate(zip(tokens_B.tolist(), log_probs_B.tolist())):
      if not rows[row].done:
        drawn[row].append((token, log_prob))
      rows[row].read(token)
      piece = rows[row].piece(last=index == max_new_tokens)
      if stream is not None and piece:
        stream(row, piece)
    if all(row.done for row in rows):
      break
  if not return_log_probs:
    return [row.text for row in rows]
  return [Generated(row.text, *map(tuple, zip(*of_row))) for row, of_row in zip(rows, drawn)]


def _checked_ids(tokenizer, prompts, seq_length, max_new_tokens) -> list[list[int]]:
  """Each prompt's token ids. Every mistake is a ValueError that names the prompt by its number."""
  prompts = [prompts] if isinstance(prompts, str) else list(prompts)
  if not prompts:
    raise ValueError("prompts=[]: give at least one prompt.")
  rows = []
  for number, prompt in enumerate(prompts):
    ids = _ids(tokenizer, prompt, number)
    for position, token in enumerate(ids):
      if not isinstance(token, (int, np.integer)) or not 0 <= token < tokenizer.vocab_size:
        raise ValueError(
          f"prompt {number}: id {token!r} at position {position} is outside the vocabulary; "
          f"ids are 0 to {tokenizer.vocab_size - 1}."
        )
    if len(ids) + max_new_tokens > seq_length:
      raise ValueError(
        f"prompt {number} has {len(ids)} tokens and max_new_tokens={max_new_tokens}: together "
        f"they may be {seq_length} (seq_length); shorten the prompt or ask for fewer."
      )
    rows.append(ids)
  return rows


def _ids(tokenizer, prompt, number) -> list[int]:
  if not isinstance(prompt, (str, Sequence, np.ndarray)):
    raise ValueError(f"prompt {number} is {prompt!r}: expected a text or a list of token ids.")
  if isinstance(prompt, str) and not prompt:
    return [tokenizer.end_of_document]
  try:
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
  except ValueError as error:
    raise ValueError(f"prompt {number}: {error}") from None
  if not ids:
    raise ValueError(
      f"prompt {number} has no ids: give at least one; [tokenizer.end_of_document] or an empty text begins a document."
    )
  return ids
