"""What a prepared folder says about itself: its manifest, and the files that it was made from.

An existing folder is compared with the request, so that old tokens are never used for new text.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from absl import logging

from tokenformer_jax.data.documents import DocumentSource
from tokenformer_jax.data.token_files import MANIFEST, SUMS, TOKENIZER, read_manifest
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.data.tokenizer_files import config_path, save_tokenizer
from tokenformer_jax.paths import is_uri, replace_text, user_path

INPUTS = "inputs.json"  # [name, size, time of last change] of every file of text.
BPE = "bpe.json"  # The request that the folder's BPE was trained for.
SHOWN = 3  # Names in a message.

Stamps = list[list]


def local_folder(folder: str | os.PathLike) -> pathlib.Path:
  """The folder to write to.

  Raises:
    ValueError: the path is empty, or a URI, where files cannot be appended to.
  """
  path = user_path(folder, "out")
  if is_uri(path):
    raise ValueError(f"out={path}: tokens are prepared in a local folder; copy it to the bucket afterwards.")
  return pathlib.Path(path)


def require_no_other_files(folder: pathlib.Path, own: Collection[str]) -> None:
  """Raises ValueError if a folder holds files other than `own` and their unfinished copies, which a killed process leaves."""
  others = set(os.listdir(folder)) if folder.is_dir() else set()
  others -= {name + ending for name in own for ending in ("", ".unfinished")}
  if others:
    raise ValueError(f"{folder} holds other files ({_some(sorted(others))}): name a new or empty folder.")


def stamps(source: DocumentSource) -> Stamps:
  """[name, bytes, time of the last change in nanoseconds] of every file of a source."""
  result = []
  for path in source.paths:
    if is_uri(path):
      stat = path.stat()
      result.append([str(path), stat.length, stat.mtime])
    else:
      stat = os.stat(path)
      result.append([str(path), stat.st_size, stat.st_mtime_ns])
  return result


def require_same_files(stored: Stamps, now: Stamps, what: str, way_out: str) -> None:
  """Raises ValueError naming the files that are new, missing or of another size; times are not compared."""
  before, after = {name: size for name, size, _ in stored}, {name: size for name, size, _ in now}
  differences = {
    "new": [name for name in after if name not in before],
    "missing": [name for name in before if name not in after],
    "of another size": [name for name in after if name in before and before[name] != after[name]],
  }
  said = [f"{len(names)} {kind} ({_some(names)})" for kind, names in differences.items() if names]
  if said:
    raise ValueError(f"{what} other files than there are now: {', '.join(said)}: {way_out}.")


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def require_same_bad_text(stored: str, now: str, what: str, way_out: str) -> None:
  """Raises ValueError if `now` would leave out or replace other text than `stored` did.

  With `error`, all text so far was readable, so that every choice gives the same tokens for it.
  """
  if stored not in (now, "error"):
    raise ValueError(f"{what} bad_text={stored!r}, not {now!r}: {way_out}.")


def begin(
  folder: pathlib.Path, source: DocumentSource, tokenizer: Tokenizer, bad_text: str, part: str | None
) -> dict[str, Any]:
  """The manifest of a folder, which is created if it does not exist.

  Args:
    folder: the folder.
    source: the documents.
    tokenizer: the tokenizer.
    bad_text: see `BadText`.
    part: the part of the source to tokenize, as `1/8`; None for all of it.

  Returns:
    The stored manifest, with the given `bad_text`; or a new one without documents.

  Raises:
    ValueError: the folder holds something else, or was begun with another source, tokenizer, option or files.
  """
  if not (folder / MANIFEST).is_file():
    require_no_other_files(folder, {TOKENIZER, config_path(folder / TOKENIZER).name, BPE, MANIFEST})
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    manifest: dict[str, Any] = dict(
      complete=False, source=source.name, tokenizer=tokenizer.fingerprint, bad_text=bad_text
    )
    manifest |= {} if part is None else {"part": part}
    manifest |= dict(documents=0, tokens=0, bytes=0, sha256=hashlib.sha256().hexdigest())
    write_json(folder / MANIFEST, manifest)
    return manifest
  manifest = read_manifest(folder)
  way_out = "remove the folder to prepare it again, or name another one"
  if manifest["source"] != source.name:
    raise ValueError(f"{folder} holds tokens of source {manifest['source']!r}, not {source.name!r}: {way_out}.")
  if not tokenizer.matches(manifest["tokenizer"]):
    raise ValueError(
      f"{folder} holds tokens of tokenizer {manifest['tokenizer']!r}, not {tokenizer.fingerprint!r}: {way_out}."
    )
  if manifest.get("part") != part:
    raise ValueError(f"{folder} holds part {manifest.get('part', 'all')}, not {part or 'all'}: {way_out}.")
  require_same_bad_text(manifest.get("bad_text", bad_text), bad_text, f"{folder} was prepared with", way_out)
  if manifest["complete"] and (folder / INPUTS).is_file():
    require_same_files(read_stamps(folder), stamps(source), f"{folder} was prepared from", way_out)
  if manifest.get("bad_text", bad_text) != bad_text:
    logging.info("%s was begun with bad_text=%s, and continues with %s.", folder, manifest["bad_text"], bad_text)
  return manifest | {"bad_text": bad_text}


def is_unchanged(folder: pathlib.Path, source: DocumentSource) -> bool:
  """Whether names, sizes and times of the files show that the text is the one that the folder was made from."""
  return bool(source.paths) and (folder / INPUTS).is_file() and read_stamps(folder) == stamps(source)


def read_stamps(folder: pathlib.Path) -> Stamps:
  """The stamps that a folder was begun with."""
  try:
    return [[name, size, time] for name, size, time in json.loads((folder / INPUTS).read_text(encoding="utf-8-sig"))]
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(f"{folder / INPUTS} cannot be read ({error}): remove {folder} and prepare it again.") from None


def write_sums(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the SHA-256 of whole files in the form that `sha256sum --check` reads; manifests have those of samples."""
  replace_text(folder / SUMS, "".join(f"{_whole_sha256(folder / name)}  {name}\n" for name in names))


def changed_file(folder: pathlib.Path) -> str:
  """The first file that differs from the folder's sums, or ""; folders of earlier versions have none."""
  lines = (folder / SUMS).read_text(encoding="utf-8").splitlines() if (folder / SUMS).is_file() else []
  sums = (line.partition("  ") for line in lines)
  return next((name for digest, _, name in sums if _whole_sha256(folder / name) != digest), "")


def _whole_sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file in one step."""
  replace_text(path, json.dumps(value, indent=2) + "\n")
