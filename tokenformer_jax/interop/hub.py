"""Where the files of a model are: a local path, a URI, or a model on the Hugging Face hub."""

import os
import re

from etils import epath

from tokenformer_jax.interop.weights import SUFFIXES
from tokenformer_jax.paths import is_uri, user_path

NORMALISATION = "preprocessor_config.json"  # How the images of a Hugging Face model are resized and normalised.
_OTHER_FILES = (
  "config.json",
  NORMALISATION,
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "vocab.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def local_path(path_or_hub_id: str | os.PathLike, name: str = "path") -> epath.Path:
  """Finds the files of a model, and downloads them if they are on the Hugging Face hub.

  Args:
    path_or_hub_id: a local path, a URI, or the name OWNER/MODEL of a model on the hub; a path that exists
      takes precedence over a name.
    name: the flag or argument that gave it, for messages.

  Returns:
    The path itself if it exists, otherwise the folder into which the hub's files were downloaded.

  Raises:
    ValueError: there is no such file and no such model, or the hub refuses the download.
  """
  path = user_path(path_or_hub_id, name)
  if path.exists():
    return path
  hub_id = os.fspath(path_or_hub_id)
  if is_uri(hub_id) or not _HUB_ID.fullmatch(hub_id) or path.suffix in SUFFIXES:
    raise ValueError(
      f"{name}={hub_id!r}: there is no such file or folder, and it is not a name OWNER/MODEL of the Hugging Face hub."
    )
  try:
    import huggingface_hub

    files = huggingface_hub.HfApi().list_repo_files(hub_id)
    suffix = next((suffix for suffix in SUFFIXES if any(file.endswith(suffix) for file in files)), SUFFIXES[0])
    return epath.Path(
      huggingface_hub.snapshot_download(hub_id, allow_patterns=[*_OTHER_FILES, f"*{suffix}", f"*{suffix}.index.json"])
    )
  except Exception as error:  # No network, no such model, no permission: the hub's errors have many types.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(
      f"{name}={hub_id!r}: there is no such file or folder, and the Hugging Face hub does not provide it ({reason})."
    ) from None
