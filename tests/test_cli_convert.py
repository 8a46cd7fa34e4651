"""Conversion keeps the model, its tokenizer and its card, through the function and through the CLI."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from flax import nnx

from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.interop.convert import convert
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.weight_config import config_json, read_config
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.language_model import LanguageModel

CONFIG = ModelConfig(
  vocab_size=257,
  num_layers=2,
  hidden_size=16,
  num_heads=2,
  qkv_tokens=9,
  proj_tokens=10,
  ffn_tokens=24,
  seq_length=32,
  rotary_fraction=0.5,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder with a grown model, as `export` writes it, and a tokenizer."""
  folder = tmp_path_factory.mktemp("exported")
  bigger, _ = grow(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), ffn_tokens=40, method="exact")
  export(bigger, folder)
  data.save_tokenizer(ByteTokenizer(), folder / "tokenizer.json")
  return folder


def test_the_cli_expands_home_folders_and_reports_what_it_wrote(tmp_path, exported):
  (tmp_path / "from").symlink_to(exported)
  done = subprocess.run(
    [sys.executable, "-m", "tokenformer_jax.cli.convert", "--from=~/from", "--to=~/to/x.bin", "--dtype=bfloat16"],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
    env={**os.environ, "HOME": str(tmp_path)},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  config = CONFIG.grown(ffn_tokens=56)
  assert done.stdout.splitlines() == [
    f"{tmp_path}/to/x.bin: {config.num_parameters:,} parameters, bfloat16.",
    "16 rows with zero values added to each layer's ffn_tokens, for the released code's τ = √N.",
  ]
  assert sorted(file.name for file in (tmp_path / "to").iterdir()) == [
    "README.md",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "x.bin",
  ]
  assert open_weights(tmp_path / "to" / "x.bin").arrays["sequential.2.mlp.key_param_tokens"].shape == (56, 16)
  assert json.loads((tmp_path / "to" / "config.json").read_text())["model"] == dataclasses.asdict(config)
  assert "Exported from `~/from`" in (tmp_path / "to" / "README.md").read_text()


def test_a_configuration_is_needed_where_shapes_do_not_determine_it(tmp_path):
  first = export(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), tmp_path / "a" / "pytorch_model.bin").path
  (first.parent / "config.json").unlink()
  with pytest.raises(ValueError, match="no named size has its shapes"):
    convert(first, tmp_path / "b")
  assert not (tmp_path / "b").exists()
  middle = convert(first, tmp_path / "b", config=CONFIG).path
  assert convert(middle, tmp_path / "c" / "x.bin").path.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
  "source, path, step, message",
  [
    ("", "out", None, "--from='': the path is empty"),
    ("exported", "", None, "--to='': the path is empty"),
    ("exported", "out", 3, "--step=3: .* is not a work folder and has no steps"),
    ("~/nowhere", "out", None, "--from='~/nowhere': there is no such file or folder"),
  ],
)
def test_a_mistake_is_named_by_its_flag(tmp_path, monkeypatch, exported, source, path, step, message):
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(ValueError, match=message):
    convert(exported if source == "exported" else source, path and tmp_path / path, step=step)
  assert not (tmp_path / "out").exists()


def test_a_configuration_file_may_lie_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "model.json").write_text(config_json(CONFIG), encoding="utf-8-sig")
  assert read_config("~/model.json") == CONFIG
  with pytest.raises(ValueError, match="--config='': the path is empty"):
    read_config("", "--config")
