"""A run's work folder: a local folder or a bucket."""

from etils import epath


def absolute(workdir: str) -> epath.Path:
  """The folder, as Orbax wants it."""
  return epath.Path(workdir).expanduser().absolute()


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all: killed on the way, the old one is still there."""
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(text)
  unfinished.replace(path)
