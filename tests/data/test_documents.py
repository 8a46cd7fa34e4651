import gzip
import json
import re

import pytest

from tests.data.test_files import COMPRESSIONS, compress
from tokenformer_jax.data.documents import BadText, Document, jsonl_files, python_sources, text_files


def read(source, choice="error"):
  bad = BadText(choice)
  return list(source.read(bad)), bad


def test_files_are_documents_in_the_order_of_their_names(tmp_path):
  for name in ("b/2.txt", "a.txt", "b/10.txt", "c.md"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"text of {name}\n")
  documents, _ = read(text_files(f"{tmp_path}/**/*.txt"))
  assert documents == [Document(n, f"text of {n}\n") for n in ("a.txt", "b/10.txt", "b/2.txt")]
  assert read(text_files(f"{tmp_path}/b/2.txt"))[0] == [Document("2.txt", "text of b/2.txt\n")]


@pytest.mark.parametrize("compression", ["none", *COMPRESSIONS])
def test_a_marker_line_ends_a_document(compression, tmp_path):
  text = b"one\ntwo\n<|end|>\nthree <|end|> here\r\n<|end|>\r\n<|end|>\nlast"
  (tmp_path / "a.txt").write_bytes(compress(compression, text))
  documents, _ = read(text_files(f"{tmp_path}/a.txt#<|end|>"))
  assert [d.text for d in documents] == ["one\ntwo\n", "three <|end|> here\r\n", "last"]
  assert all(d.key == d.text for d in documents)


def test_python_sources_are_the_same_at_every_call():
  documents, _ = read(python_sources())
  keys = [d.key for d in documents]
  assert "json/decoder.py" in keys and len(set(keys)) == len(keys) > 300
  assert not [key for key in keys if "site-packages" in key or key.startswith("test/")]
  assert documents == read(python_sources())[0]


BAD = b"good\n<m>\nna\xefve \xff!\n<m>\nalso good\n"


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path):
  (tmp_path / "a.txt").write_bytes(BAD)
  for marker in ("", "#<m>"):
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8 at byte {BAD.index(0xEF)} \(0xef\)"):
      read(text_files(f"{tmp_path}/a.txt{marker}"))


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
  (tmp_path / "a.txt").write_bytes(BAD.replace(b"na", "\ufffd".encode()))
  documents, bad = read(text_files(f"{tmp_path}/a.txt#<m>"), "replace")
  assert [d.text for d in documents] == ["good\n", "\ufffd\ufffdve \ufffd!\n", "also good\n"]
  assert (bad.replaced, bad.skipped) == (2, 0)


def test_documents_that_are_not_utf8_are_skipped_and_counted(tmp_path):
  (tmp_path / "a.txt").write_bytes(BAD)
  documents, bad = read(text_files(f"{tmp_path}/a.txt#<m>"), "skip")
  assert [d.text for d in documents] == ["good\n", "also good\n"]
  assert (bad.replaced, bad.skipped) == (0, 1)


def test_globs_without_a_match_and_empty_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match=re.escape(f"no file matches '{tmp_path}/*.txt'")):
    text_files(f"{tmp_path}/*.txt")
  (tmp_path / "a.txt").write_text("a")
  for empty in (b"", b"\xef\xbb\xbf", gzip.compress(b"")):
    (tmp_path / "b.txt").write_bytes(empty)
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
      read(text_files(f"{tmp_path}/*.txt"))
    documents, bad = read(text_files(f"{tmp_path}/*.txt"), "skip")
    assert (len(documents), bad.skipped) == (1, 1)


@pytest.mark.parametrize("marker", ["", "#<m>"])
def test_what_comes_before_the_damage_of_a_compressed_file_is_kept(marker, tmp_path):
  parts = ["".join(f"line {i * i}\n" for i in range(k, k + 100)) for k in range(0, 1000, 100)]
  raw = gzip.compress("<m>\n".join(parts).encode())
  (tmp_path / "a.gz").write_bytes(raw[:-20])
  (tmp_path / "b.txt").write_text("whole")
  with pytest.raises(ValueError, match=r"a\.gz: the gzip stream breaks off after \d+ bytes"):
    read(text_files(f"{tmp_path}/*{marker}"))
  documents, bad = read(text_files(f"{tmp_path}/*{marker}"), "skip")
  good = [d.text for d in documents[:-1]]
  assert good == (parts[:9] if marker else [])
  assert documents[-1].text == "whole" and bad.skipped == 1


@pytest.mark.parametrize(
  "source, text", [(text_files, b"first\nline\n"), (jsonl_files, b'{"text": "first\\nline\\n"}\n')]
)
def test_a_byte_order_mark_is_no_text_and_counts_in_offsets(source, text, tmp_path):
  bad_line = b'{"text": "\xff"}'
  for compression in ("none", "gzip"):
    raw = compress(compression, b"\xef\xbb\xbf" + text)
    (tmp_path / "a").write_bytes(raw)
    assert read(source(f"{tmp_path}/a#text"))[0] == [Document("first\nline\n", "first\nline\n")]
  (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text + bad_line)
  with pytest.raises(ValueError, match=f"is not UTF-8 at byte {3 + len(text) + 10} "):
    read(source(f"{tmp_path}/a#text"))


def test_jsonl_takes_one_field_of_every_line(tmp_path):
  # U+2028 and its like are line ends for str.splitlines, and not for JSON lines.
  texts = ["one\nline", "a\u2028b\u2029c\x85d\x1ce\x0bf", "zwölf"]
  lines = "\n \r\n".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) for text in texts)
  (tmp_path / "a.jsonl").write_bytes(lines.encode())
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  documents, _ = read(jsonl_files(f"{tmp_path}/*#text"))
  assert [d.text for d in documents] == texts * 2


@pytest.mark.parametrize(
  "line, words",
  [
    (b'{"text": "a"', r"a\.jsonl line 2 \(byte 14\) is not JSON"),
    (b'{"txt": "a", "n": 1}', r"line 2 \(byte 14\) has no field 'text'; it has 'txt', 'n'\."),
    (b'{"a\\nb": 1, "\\ud800": 2}', r"has no field 'text'; it has 'a\\nb', '\\ud800'\."),
    (b"{}", r"has no field 'text'; it has none\."),
    (b'["text"]', r"has no field 'text'; it has only a list"),
    (b'{"text": 3}', r"field 'text' is a int, not text"),
    (b'{"text": "a", "n": ' + b"7" * 5000 + b"}", r"line 2 \(byte 14\) holds an integer of more than 4300 digits"),
    (b'{"text": "a", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", r"line 2 \(byte 14\) is nested too deeply"),
    (b'{"text": "\xff"}', r"line 2 \(byte 14\) is not UTF-8 at byte 24"),
    (b'{"text": "a\\ud800"}', r"line 2 \(byte 14\): field 'text' is not Unicode at character 1"),
  ],
)
def test_bad_json_lines_are_named_or_left_out(line, words, tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
  with pytest.raises(ValueError, match=words) as error:
    read(jsonl_files(f"{tmp_path}/a.jsonl#text"))
  assert "\n" not in str(error.value)
  documents, bad = read(jsonl_files(f"{tmp_path}/a.jsonl#text"), "skip")
  assert ([d.text for d in documents], bad.skipped) == (["a", "b"], 1)


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path):
  (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b\ud83d\ude42\ufffd"}')
  documents, bad = read(jsonl_files(f"{tmp_path}/a.jsonl#text"), "replace")
  assert ([d.text for d in documents], bad.replaced) == (["a\ufffdb\U0001f642\ufffd"], 1)


def test_jsonl_sources_must_name_a_field(tmp_path):
  with pytest.raises(ValueError, match="name the field"):
    jsonl_files(f"{tmp_path}/a.jsonl")
