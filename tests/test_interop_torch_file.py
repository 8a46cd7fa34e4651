"""PyTorch files are read as torch reads them and written so that torch can read them; their pickles are not run."""

import base64
import io
import os
import pickle
import time
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from tokenformer_jax.interop.stored_array import ComputedArray
from tokenformer_jax.interop.torch_file import read_torch, write_torch

# An OrderedDict saved by torch 2.13.0: a and b share one storage as in the files of zero_to_fp32, c is a Parameter,
# d is bfloat16, e float16, f int64.
SAVED_BY_TORCH = zlib.decompress(
  base64.b85decode(
    "c-pO2O>7%Q6rSDnUpAq%X+jfzO8F@`C3V(bJGM*GxC>eVi-co@WH{8U?R9LivGdlGQb3U+p@eb*ao~u`g>x^68_JObNWg&;5|udh"
    ")E>FPn;FO1-6Rd9%<5_6(fhvly`A^ox@;*CLJ|qGZ;g^Oq;-"
    "9+X;VA3_MU4Rr^!3}*QVTP^jz0z&`z)0SKsiOj^{LA?lh<hWTpaAvMM2&4RV9_yhb}!Tc;hjuhu-LzTR=0HR^QxJ+F2xqk@u5R^#"
    "a0M^Agjfrx;prrWdWo8nM~C@0h)R#k9stgS=bnxK$awq$&iZ5Xi>OWFqY(>4<@N@1)54{=Z(PP8#dJJOD}V{Hz5c-"
    "cx=5$1o=lGt`iz{V+@uD}F`HDK}(@oTncuR7H6RCr{UnM2ZW2Ki+QQ_B`XVtE^;Q62I>D)=9x@OTBDxWRv%{REz@z&Va=!c&52ki"
    "5aOPtOnYf10~x;28{{P<WOFP`2Q_C2hfTg8X?3$qLMHM+Yth_+GKy){yH3?xMr25POkv$y<<OTyug;qmZsZhC8-"
    "E4{*KS>#hvBvfL#LIpmTk%!|Y^<Gk1kg0D#7QUzXI-"
    "++bc2m)&O{%lrcu($!2tE}>1X#+~U60SL3AL|OPSW>^=ucyjZJh6E%`dL>dgjxB}>K(@it2fo^d8;<94TwzRM5u_<jPkp?zkkfcG"
    "drAek}Pn_L3!3}x3kh+b-"
    "L6v3J0~uzgqKICSd7(xP$2s`Mv_iNQ4Qfe?Xlc>oe0J#O+Y(I*em$@z3cPdd2R`F+yJ2?dmzrG?tDne6R+zmkHTK+d(5sgq%Ywp}"
    "mW?iS{|#O|)BRJ7_<n-A22IMoOp@?IhY%iDh!<mhwZHWpP9%#bG9C)5wuy>Sub$4vTwf_KzP~pu`bzuMFd6Ok?rE-"
    "r!G*rJdJ+MgQin3-$kYfBOG$f34KtAF=3nU!8dyLz2i5(WArYS<{e+xPOUZ;)$!@-"
    "fkZK{#3kh<QR73!ULtCt1R*_U#+}#bpK3~Ja1qwzwdY*?BEY=_Tj2^nx>&2M~J57a_OR$F68u#rss-"
    "UzL3}OFsl```D{9;=k-DnkC@7@6IahCQAd)il$h9|PXAOJ-KX659S#Hivuiv6`d%gnjKDD7KYAtu_)`iwc;1C6{F7%aK=Fm37*4D"
    "((%<PL0pxEA*_%^gn7>hju$z%RSUL>zcUTZM72Shn!Z3ep1YuwLV0swl?}i|3BDM$1hGG6vRs*oAfE{v={^FVr;C>ajgUh~b#bUD"
    "q$Fs^s-@m`$enS@f^|;s(7az3q?g+rMXiQ*6xxeuJ2O=3QT>"
  )
)
SAVED = {
  "a": np.arange(2, 8, dtype=np.float32).reshape(2, 3) / 8,
  "b": np.arange(8, 12, dtype=np.float32).reshape(4, 1) / 8,
  "c": np.array([[1.5, -2.0]], np.float32),
  "d": np.array([0.1, -3.0, 1e30], ml_dtypes.bfloat16),
  "e": np.array([0.1, 65504.0], np.float16),
  "f": np.array([[2**40]]),
}


def text(value):
  return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(key, size, shape, offset=0, strides=None, storage="FloatStorage"):
  """The opcodes of one tensor, with numbers as BININT."""

  def numbers(values):
    return b"(" + b"".join(b"J" + int(value).to_bytes(4, "little", signed=True) for value in values) + b"t"

  strides = strides or [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
  kind = f"ctorch\n{storage}\n".encode()
  persistent = b"(" + text("storage") + kind + text(key) + text("cpu") + numbers([size])[1:] + b"Q"
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + persistent
    + numbers([offset])[1:-1]
    + numbers(shape)
    + numbers(strides)
    + b"\x89ccollections\nOrderedDict\n)RtR"
  )


def archive(path, program, storages=(), method=zipfile.ZIP_STORED, byteorder=b"little"):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("w/data.pkl", program)
    file.writestr("w/byteorder", byteorder)
    for key, storage in dict(storages).items():
      file.writestr(f"w/data/{key}", storage, method)
  return path


def one_tensor(path, *args, storages=None, **kwargs):
  storages = {"0": np.arange(12, dtype=np.float32).tobytes()} if storages is None else storages
  return archive(path, b"\x80\x02}" + text("x") + tensor(*args, **kwargs) + b"s.", storages)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "w.bin"


def test_a_file_of_torch_is_read_as_it_was_saved(path):
  path.write_bytes(SAVED_BY_TORCH)
  arrays = read_torch(path).arrays
  assert list(arrays) == list(SAVED)
  for name, expected in SAVED.items():
    read = arrays[name].read()
    assert (read.dtype, arrays[name].shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(read, expected)
  np.testing.assert_array_equal(arrays["b"].read(slice(1, 3)), SAVED["b"][1:3])


class Plain(pickle.Unpickler):
  """Python's own unpickler, with the few names that torch.save uses."""

  def __init__(self, zipped):
    super().__init__(io.BytesIO(zipped.read("archive/data.pkl")))
    self.zipped = zipped

  def find_class(self, module, name):
    kinds = {"FloatStorage": np.float32, "BFloat16Storage": ml_dtypes.bfloat16}
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda storage, offset, shape, strides, *_: np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [stride * storage.itemsize for stride in strides]
      ).copy()
    return kinds[name] if module == "torch" else super().find_class(module, name)

  def persistent_load(self, described):
    assert described[0] == "storage" and described[3] == "cpu"
    storage = np.frombuffer(self.zipped.read(f"archive/data/{described[2]}"), described[1])
    assert storage.size == described[4]
    return storage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_file_is_a_torch_file(path, dtype):
  arrays = {"first.w": np.arange(300, dtype=np.float32).reshape(2, 150), "b": np.array([-1.5], np.float32)}
  computed = {name: ComputedArray(array.shape, lambda array=array: array) for name, array in arrays.items()}
  write_torch(path, computed, dtype)
  with zipfile.ZipFile(path) as zipped:
    assert zipped.testzip() is None
    assert zipped.read("archive/version") == b"3\n" and zipped.read("archive/byteorder") == b"little"
    plain = Plain(zipped).load()
  ours = {name: array.read() for name, array in read_torch(path).arrays.items()}
  for read in (plain, ours):
    assert list(read) == list(arrays)
    for name, array in arrays.items():
      assert read[name].dtype == np.dtype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])
      np.testing.assert_array_equal(read[name], array.astype(read[name].dtype))
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_torch_reads_a_written_file(path):
  torch = pytest.importorskip("torch")
  array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  write_torch(path, {"x": ComputedArray(array.shape, lambda: array)}, "float32")
  for mapped in (False, True):
    np.testing.assert_array_equal(torch.load(path, weights_only=True, mmap=mapped)["x"].numpy(), array)
  torch.save({"x": torch.from_numpy(array)}, path)
  np.testing.assert_array_equal(read_torch(path).arrays["x"].read(), array)


def test_a_failed_write_leaves_nothing(path):
  def fail():
    raise RuntimeError("no more")

  path.write_bytes(b"before")
  with pytest.raises(RuntimeError, match="no more"):
    write_torch(path, {"x": ComputedArray((1,), fail)}, "float32")
  assert path.read_bytes() == b"before"
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_state_dict_inside_a_larger_dict_is_found(path):
  inner = b"}" + text("x") + tensor("0", 12, (3, 4)) + b"s"
  rates = text("rates") + b"](G" + bytes(8) + b"Ne"
  program = b"\x80\x02}(" + text("step") + b"K\x03" + text("module") + inner + rates + b"u."
  archive(path, program, {"0": np.arange(12, dtype=np.float32).tobytes()})
  np.testing.assert_array_equal(read_torch(path).arrays["x"].read(), np.arange(12.0).reshape(3, 4))


class Runs:
  """Pickles to a call that makes a folder."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}, lambda x: {"module": {"y": [x]}}])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(path, tmp_path, protocol, wrap):
  marker = tmp_path / "marker"
  program = pickle.dumps(wrap(Runs(marker)), protocol)
  archive(path, program)
  with pytest.raises(ValueError, match=f"^{path}: its pickle .*nothing of it was run"):
    read_torch(path)
  assert not marker.exists()
  pickle.loads(program)  # Python's own unpickler runs it.
  assert marker.exists()


def deep_tuple(levels):
  """A tuple that contains the previous tuple twice: short to write, 2^levels long to print, hash or compare."""
  return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


@pytest.mark.parametrize(
  "program, message",
  [
    (b"\x80\x02cposix\nsystem\n" + text("true") + b"\x85R.", "wants to call 'posix system'"),
    (b"\x80\x02cbuiltins\ngetattr\n(cposix\nsystem\n" + text("__globals__") + b"tR.", "getattr"),
    (b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02e\x85R.", "wants to call"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", "is a _Global"),
    (b"\x80\x02" + deep_tuple(1000) + text("x") + b"\x86Q.", "broken"),
    (b"\x80\x02(" + deep_tuple(1000) + b"tQ.", "broken"),
    (b"\x80\x02}" + deep_tuple(1000) + b"K\x01s.", "is used as a key"),
    (b"\x80\x02" + deep_tuple(1000) + b")R.", "wants to call"),
    (b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + deep_tuple(99) + b"NK\x01tQ.", "storage"),
    (b"\x80\x02(" + text("storage") + b"cnumpy\nndarray\n" + text("0") + b"NK\x01tQ.", "not a storage"),
    (b"\x80\x02}r\xff\xff\xff\xff.", "no arrays with names"),  # A memo slot of 4 billion.
    (b"\x80\x02X\xff\xff\xff\x7fa.", "broken"),  # A string of 2 GB.
    (b"\x80\x02\x8b\xff\xff\xff\x7f.", "broken"),  # A number of 2 GB.
    (b"\x80\x02" + b"(" * 500_000 + b".", "broken"),
    (b"\x80\x02" + b"K\x01" * 600_000, "damaged zip archive .*1200002 bytes"),
    (b"\x80\x02}", "broken"),
    (b"\x80\x02u.", "broken"),
    (b"\x80\x02K\x01.", "is a int"),
    (b"\x80\x02}.", "no arrays with names"),
    (b"garbage", "broken"),
  ],
)
def test_hostile_and_broken_pickles_cost_little(path, program, message):
  archive(path, program)
  start = time.process_time()
  with pytest.raises(ValueError, match=message) as caught:
    read_torch(path)
  # The slowest takes a quarter of a second; the limit leaves time for a busy machine.
  assert time.process_time() - start < 5.0
  assert len(str(caught.value)) < 600 + len(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "arguments, settings, message",
  [
    (("0", 12, (4, 3)), dict(strides=(1, 4)), r"strides \(1, 4\); call .contiguous"),
    (("0", 12, (4, 3)), dict(offset=1), "array of 12 numbers begins at 1 in a storage of 12"),
    (("0", 12, (2,)), dict(offset=-1), "array of 2 numbers begins at -1"),
    (("0", 12, (-2,)), {}, "not a valid array shape"),
    (("0", 12, (2**31 - 1,) * 3), dict(strides=(1, 1, 1)), "not a valid array shape"),
    (("0", 12, (1,) * 9), {}, "not a valid array shape"),
    (("0", 13, (2,)), {}, "storage 0 is smaller than the pickle claims"),
    (("0", -1, (2,)), {}, "not a valid array shape"),
    (("1", 12, (2,)), {}, "broken"),
    (("0", 12, (2,)), dict(storage="UntypedStorage"), "not a storage of numbers"),
  ],
)
def test_impossible_arrays_are_refused(path, arguments, settings, message):
  one_tensor(path, "0", 12, (3, 4))
  np.testing.assert_array_equal(read_torch(path).arrays["x"].read(), np.arange(12.0).reshape(3, 4))
  one_tensor(path, *arguments, **settings)
  with pytest.raises(ValueError, match=message):
    read_torch(path)


def test_an_axis_of_one_element_may_have_any_stride(path):
  one_tensor(path, "0", 12, (3, 1, 4), strides=(4, 77, 1))
  np.testing.assert_array_equal(read_torch(path).arrays["x"].read(), np.arange(12.0).reshape(3, 1, 4))


def test_a_damaged_archive_is_refused(path):
  for length in (0, 30, 500, 1000, len(SAVED_BY_TORCH) - 1):
    path.write_bytes(SAVED_BY_TORCH[:length])
    with pytest.raises(ValueError, match="damaged zip archive"):
      read_torch(path)
  at = SAVED_BY_TORCH.index(SAVED["c"].tobytes())
  path.write_bytes(SAVED_BY_TORCH[:at] + b"\x01" + SAVED_BY_TORCH[at + 1 :])
  with pytest.raises(ValueError, match="Bad CRC-32"):
    read_torch(path)


def test_other_archives_are_refused(path):
  program = b"\x80\x02}" + text("x") + tensor("0", 12, (3, 4)) + b"s."
  archive(path, program, {"0": bytes(48)}, zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="w/data/0 is compressed"):
    read_torch(path)
  archive(path, b"", byteorder=b"big")
  with pytest.raises(ValueError, match="its numbers are big-endian"):
    read_torch(path)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("w/data.pkl", bytes(50_000_000))  # 50 kB in the file.
  with pytest.raises(ValueError, match="50000000 bytes, above 1048576"):
    read_torch(path)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("word/document.xml", "<w/>")
  with pytest.raises(ValueError, match="torch.save did not write"):
    read_torch(path)
