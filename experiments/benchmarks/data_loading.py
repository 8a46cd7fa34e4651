"""Speed of the data pipeline: the loader alone and beside training, tokenizing, and memory over an epoch.

    python experiments/benchmarks/data_loading.py
    python experiments/benchmarks/data_loading.py --tokenizer=PATH --text='text:books/*.txt'

Two cores that were also busy with other work (load 5 to 6), November 2026, Python 3.11.7, jax 0.10.2, grain 0.2.18,
tokenizers 0.23.3; `--seconds=3`:

    source          packing      row    million tokens/s
    python-sources  contiguous    128        3.8
    python-sources  documents     128        1.9
    tokens          contiguous    128        2.4
    tokens          documents     128        1.3
    tokens          contiguous   1024       13.9
    tokens          documents    1024        9.4
    tokens          contiguous   2048       28.0
    tokens          documents    2048       20.3
    quickstart's model before growth: 2,535 tokens/s trained; the loader alone gives 1515×
    quickstart's model after growth: 1,052 tokens/s trained; the loader alone gives 3651×
    tokenizers' encode_batch_fast   1.47 million tokens/s
    prepare, with reading, writing  1.31 million tokens/s (89%)
    One epoch of 1,000,000,000 tokens (2.0 GB), 21 s, 48.5 million tokens/s
    MB of memory at each tenth: 726 727 727 727 727 727 727 727 727 727
"""

import pathlib
import runpy
import tempfile
import time

import numpy as np
from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, ModelConfig
from tokenformer_jax.data import open_data, open_tokenizer
from tokenformer_jax.data.corpus import batches_of_documents
from tokenformer_jax.data.documents import BadText
from tokenformer_jax.data.prepare import prepare
from tokenformer_jax.data.prepared_bpe import train_or_load_bpe
from tokenformer_jax.data.sources import open_documents
from tokenformer_jax.data.spec import parse_sources

_TEXT = flags.DEFINE_string("text", "python-sources", "The source of text to tokenize.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "Tokenizer to tokenize with; a BPE of 5000 ids learnt from the text if not given."
)
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000_000, "Ids in the token file whose whole epoch is read.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Duration of each measurement.")


def main(argv):
  del argv
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    loading(folder)
    tokenizing(folder)
    memory(folder)


def loading(folder: pathlib.Path) -> None:
  """Measures tokens/s of the loader alone, and of training the quickstart's model before and after its growth."""
  quickstart = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))
  config = Config.from_dict(quickstart["get_config"]())
  print("\nLoader alone, batches of 16 rows\nsource          packing      row    million tokens/s")
  write_tokens(folder / "tokens.bin", 100_000_000)
  rates = {}
  for source, length in (
    ("python-sources", config.model.seq_length),
    (f"tokens:{folder}/tokens.bin", 128),
    (f"tokens:{folder}/tokens.bin", 1024),
    (f"tokens:{folder}/tokens.bin", 2048),
  ):
    for packing in ("contiguous", "documents"):
      data = open_data(DataConfig(source=source, packing=packing), seq_length=length)
      rates[source, packing, length] = rate(data.train_batches().__next__, 16 * length)
      print(f"{source.split(':')[0]:15} {packing:12} {length:4} {rates[source, packing, length] / 1e6:10.1f}")
  loader = rates["python-sources", "contiguous", config.model.seq_length]
  for name, model in (("before growth", config.model), ("after growth", config.model_at(10**9))):
    eaten = training_rate(config, model)
    print(f"quickstart's model {name}: {eaten:,.0f} tokens/s trained; the loader alone gives {loader / eaten:.0f}×")


def training_rate(config: Config, model: ModelConfig) -> float:
  """Returns tokens/s of training steps on one batch."""
  import jax

  from tokenformer_jax.distributed.mesh import make_mesh
  from tokenformer_jax.training.program import make_program

  batch = next(open_data(config.data, seq_length=model.seq_length).train_batches())
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    program = make_program(config, model, mesh)
    states = [program.initial_state()]

    def step():
      states[0], metrics = program.train_step(states[0], batch)
      jax.block_until_ready(metrics)

    return rate(step, batch.inputs.size)


def tokenizing(folder: pathlib.Path) -> None:
  """Measures tokens/s of `prepare`, and of the tokenizers package alone on the same documents."""
  source = open_documents(parse_sources(_TEXT.value)[0])
  if _TOKENIZER.value:
    tokenizer = open_tokenizer(_TOKENIZER.value)
  else:
    tokenizer = train_or_load_bpe(source, 5000, folder / "bpe")
  batches = [[d.text for d in batch] for batch in batches_of_documents(source.read(BadText()))]
  raw = tokenizer._tokenizer  # The object of the tokenizers package.
  own, ours = [], []
  for attempt in range(3):  # The two alternate, so that other work on the machine slows both.
    start = time.perf_counter()
    count = sum(len(encoding) for batch in batches for encoding in raw.encode_batch_fast(batch))
    own.append(count / (time.perf_counter() - start))
    start = time.perf_counter()
    manifest = prepare(source, tokenizer, folder / f"prepared{attempt}")
    ours.append(manifest["tokens"] / (time.perf_counter() - start))
  print(
    f"\nTokenizing {manifest['bytes']:,} bytes into {manifest['tokens']:,} tokens\n"
    f"tokenizers' encode_batch_fast   {max(own) / 1e6:.2f} million tokens/s\n"
    f"prepare, with reading, writing  {max(ours) / 1e6:.2f} million tokens/s "
    f"({max(ours) / max(own):.0%})"
  )


def memory(folder: pathlib.Path) -> None:
  """Measures the memory of the process, without mapped pages, over one epoch of a large token file."""
  write_tokens(folder / "large.bin", _TOKENS.value)
  write_tokens(folder / "small.bin", 10_000_000)
  config = DataConfig(source=f"tokens:{folder}/large.bin", held_out_source=f"tokens:{folder}/small.bin")
  data = open_data(config, seq_length=2048)
  steps = data.report["train"][0]["windows"] // 16
  batches, used, start = data.train_batches(), [], time.perf_counter()
  for step in range(steps):
    next(batches)
    if step % max(steps // 10, 1) == 0:
      used.append(anonymous_megabytes())
  seconds = time.perf_counter() - start
  print(
    f"\nOne epoch of {_TOKENS.value:,} tokens ({_TOKENS.value * 2 / 1e9:.1f} GB), {seconds:.0f} s, "
    f"{_TOKENS.value / seconds / 1e6:.1f} million tokens/s\nMB of memory at each tenth: "
    + " ".join(f"{value:.0f}" for value in used)
  )


def anonymous_megabytes() -> float:
  """Returns the memory that belongs to this process alone. The system may drop the pages of mapped files."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def write_tokens(path: pathlib.Path, count: int) -> None:
  """Writes a bare token file of random bytes with the id that ends a document after every 1,000 ids."""
  rng = np.random.default_rng(0)
  with open(path, "wb") as file:
    for start in range(0, count, 10_000_000):
      ids = rng.integers(0, 256, min(10_000_000, count - start)).astype(np.uint16)
      ids[999::1000] = 256
      file.write(ids.tobytes())


def rate(step, tokens: int) -> float:
  """Returns tokens/s of `step()`, each call of which takes `tokens` tokens."""
  for _ in range(10):
    step()
  start, count = time.perf_counter(), 0
  while time.perf_counter() - start < _SECONDS.value:
    step()
    count += tokens
  return count / (time.perf_counter() - start)


if __name__ == "__main__":
  command.run(main)
