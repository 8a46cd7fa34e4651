"""Weights that are not on this machine: the Hugging Face hub."""

import os
import pathlib
import re

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def local_path(path_or_hub_id: str | os.PathLike) -> pathlib.Path:
  """The path itself where it is there, else the folder into which the hub's files are downloaded.

  Raises:
    ValueError: neither a path nor a model of the hub, or the hub does not give it.
  """
  path = pathlib.Path(path_or_hub_id).expanduser()
  name = str(path_or_hub_id)
  if path.exists():
    return path
  if not _HUB_ID.fullmatch(name) or path.suffix in (".bin", ".safetensors"):
    raise ValueError(f"{name}: no such file or folder, and no OWNER/MODEL of the Hugging Face hub.")
  try:
    import huggingface_hub

    files = huggingface_hub.HfApi().list_repo_files(name)
    suffix = ".safetensors" if any(file.endswith(".safetensors") for file in files) else ".bin"
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=["config.json", "tokenizer.json", f"*{suffix}", f"*{suffix}.index.json"]
      )
    )
  except Exception as error:  # The package missing, no network, no such model, a gate: of many types.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(
      f"{name}: no such file or folder here, and the Hugging Face hub does not give it ({reason})."
    ) from None
