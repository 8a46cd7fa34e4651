"""The convert door, as a user calls it."""

import dataclasses
import json
import pathlib
import subprocess
import sys

from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.language_model import LanguageModel

CONFIG = ModelConfig(
  vocab_size=37,
  num_layers=2,
  hidden_size=16,
  num_heads=2,
  qkv_tokens=9,
  proj_tokens=10,
  ffn_tokens=24,
  seq_length=32,
  rotary_fraction=0.5,
)


def convert(*arguments):
  command = [sys.executable, "-m", "tokenformer_jax.cli.convert", *arguments]
  root = pathlib.Path(__file__).parent.parent
  return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def test_there_and_back(tmp_path):
  model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
  first = export(model, tmp_path / "a" / "pytorch_model.bin").path
  (first.parent / "config.json").rename(tmp_path / "model.json")
  done = convert(f"--from={first}", f"--to={tmp_path / 'b'}", f"--config={tmp_path / 'model.json'}")
  assert done.returncode == 0, done.stderr
  written = tmp_path / "b" / "model.safetensors"
  assert done.stdout == f"{written}: {CONFIG.num_parameters:,} parameters, float32.\n"
  done = convert(f"--from={tmp_path / 'b'}", f"--to={tmp_path / 'c' / 'again.bin'}")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "c" / "again.bin").read_bytes() == first.read_bytes()


def test_a_grown_model(tmp_path):
  bigger, _ = grow(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), ffn_tokens=40)
  ours = export(bigger, tmp_path / "ours").path
  done = convert(f"--from={ours}", f"--to={tmp_path / 'theirs.bin'}", "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[1:] == [
    "16 rows with zero values added to each layer's ffn_tokens, for the released code's τ = √N."
  ]
  assert open_weights(tmp_path / "theirs.bin").arrays["sequential.2.mlp.key_param_tokens"].shape == (56, 16)
  config = json.loads((tmp_path / "config.json").read_text())["model"]
  assert config == dataclasses.asdict(CONFIG.grown(ffn_tokens=56))


def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path):
  (tmp_path / "page.bin").write_text("<html>404</html>")
  done = convert(f"--from={tmp_path / 'page.bin'}", f"--to={tmp_path / 'out'}")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: {tmp_path / 'page.bin'}: an HTML or XML page")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "out").exists()
