"""The text of one row while it is being generated: where it ends, and how much of it is final."""

from collections.abc import Sequence

# What tokenizers write for bytes that are not a character, because they are wrong or because the rest is missing.
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
# The text of a token depends on a few tokens before it. Each new token is decoded together with at least this many and
# at most twice as many tokens before it, so that a token costs the same however long the text is.
_WINDOW = 32


class Continuation:
  """The text of the tokens read so far, as it reads after its prompt.

  Tokenizers that are not byte-level write no space before the first word of a text, so tokens are decoded in the
  context of those before them: prompt + continuation is the text of all tokens. A token may end inside a character and
  a stop string may span tokens, so the last characters become final only when later tokens have shown that nothing
  takes them back.

  Args:
    tokenizer: has `decode(ids) -> str` and `end_of_document`.
    stop: strings that end the text; it is cut before the first of them.
    prompt: the ids of the prompt. Those after its last end of document are the context.

  Attributes:
    text: the text of the continuation, cut at its end.
    done: whether an end of document or a stop string has ended it.
  """

  def __init__(self, tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
    self.text = ""
    self.done = False
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    self._num_streamed = 0
    # The last tokens, the text of the first `_num_decided` of them, which does not change any more, and the text of the
    # continuation up to there.
    self._ids = _after_last(tokenizer.end_of_document, prompt)[-_WINDOW:]
    self._num_decided = len(self._ids)
    self._decided = tokenizer.decode(self._ids) if self._ids else ""
    self._before = ""

  def read(self, token: int) -> None:
    """Takes the next token; tokens after the end change nothing."""
    if self.done:
      return
    if token == self._tokenizer.end_of_document:
      self.done = True
      return
    self._ids.append(token)
    window = self._tokenizer.decode(self._ids)
    # The prefix is shorter than the decided text only where the prompt ended inside a character.
    self.text = self._before + window[_common_length(self._decided, window) :]
    if len(self._ids) - self._num_decided >= _WINDOW and not window.endswith(_REPLACEMENT):
      self._ids = self._ids[self._num_decided :]
      self._num_decided = len(self._ids)
      self._before, self._decided = self.text, self._tokenizer.decode(self._ids)
    found = [self.text.find(stop) for stop in self._stop if stop in self.text]
    if found:
      self.text = self.text[: min(found)]
      self.done = True

  def piece(self, last: bool = False) -> str:
    """The text that became final since the previous call; all of the rest if `last` says that no token will follow."""
    end = len(self.text) if last or self.done else len(self.text) - self._num_open()
    piece = self.text[self._num_streamed : end]
    self._num_streamed = max(end, self._num_streamed)
    return piece

  def _num_open(self) -> int:
    """How many characters at the end may still change: an incomplete one, and the beginning of a stop string."""
    complete = self.text.rstrip(_REPLACEMENT)
    incomplete = min(len(self.text) - len(complete), _LONGEST_CHARACTER - 1)
    complete = self.text[: len(self.text) - incomplete]
    beginnings = [stop[:length] for stop in self._stop for length in range(1, len(stop))]
    return incomplete + max((len(start) for start in beginnings if complete.endswith(start)), default=0)


def _after_last(end_of_document: int, ids: Sequence[int]) -> list[int]:
  ids = [int(i) for i in ids]
  return ids[len(ids) - ids[::-1].index(end_of_document) :] if end_of_document in ids else ids


def _common_length(a: str, b: str) -> int:
  """The length of the longest common prefix."""
  differences = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
  return len(a) if b.startswith(a) else next(differences, min(len(a), len(b)))
