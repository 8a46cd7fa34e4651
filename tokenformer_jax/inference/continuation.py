"""One row's text while it is being written: where it ends, and what of it is final."""

from collections.abc import Sequence

# What tokenizers write for bytes that are no character, be they wrong or only not complete yet.
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
# So many tokens are decoded again with each that follows, up to twice as many, and not the text from its beginning.
_WINDOW = 32


class Continuation:
  """The text of the tokens read so far.

  A token may end inside a character and a stop string may span tokens, so the last characters
  become final only when the following tokens have shown that nothing takes them back.

  Args:
    tokenizer: `decode(ids) -> str` and `end_of_document`.
    stop: strings that end the text; it is cut before the first of them.

  Attributes:
    text: the text, cut at its end.
    done: whether an end of document or a stop string ended it.
  """

  def __init__(self, tokenizer, stop: Sequence[str] = ()):
    self.text = ""
    self.done = False
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    self._streamed = 0
    # The last tokens; of these the first `_decided`, whose text is not going to change, show what those after them add.
    self._ids, self._decided = [], 0
    # The text of all decided tokens, and how much of it is that of those in `_ids`.
    self._before, self._overlap = "", 0

  def read(self, token: int) -> None:
    """Takes the next token; tokens after the end change nothing."""
    if self.done:
      return
    if token == self._tokenizer.end_of_document:
      self.done = True
      return
    self._ids.append(token)
    window = self._tokenizer.decode(self._ids)
    self.text = self._before + window[self._overlap :]
    if len(self._ids) - self._decided >= _WINDOW and not window.endswith(_REPLACEMENT):
      self._ids = self._ids[self._decided :]
      self._decided = len(self._ids)
      self._before, self._overlap = self.text, len(self._tokenizer.decode(self._ids))
    ends = [self.text.find(stop) for stop in self._stop if stop in self.text]
    if ends:
      self.text = self.text[: min(ends)]
      self.done = True

  def piece(self, last: bool = False) -> str:
    """The text that became final since the previous call; all of the rest if no token will follow."""
    final = len(self.text) if last or self.done else len(self.text) - self._open()
    piece = self.text[self._streamed : final]
    self._streamed = max(final, self._streamed)
    return piece

  def _open(self) -> int:
    """How many characters at the end may still change: a broken one, and the start of a stop string."""
    whole = self.text.rstrip(_REPLACEMENT)
    broken = min(len(self.text) - len(whole), _LONGEST_CHARACTER - 1)
    whole = self.text[: len(self.text) - broken]
    starts = [stop[:length] for stop in self._stop for length in range(1, len(stop))]
    return broken + max((len(start) for start in starts if whole.endswith(start)), default=0)
