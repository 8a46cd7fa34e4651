"""The documents are true: their Python and notebooks run, their commands' flags and fields, files and extras exist."""

import functools
import importlib.util
import pathlib
import re
import runpy

import ml_collections
import nbclient
import nbformat
import numpy as np
import pytest
from absl import flags

from tokenformer_jax.config import TOKEN_COUNTS, Config, ModelConfig
from tokenformer_jax.config.presets import PRESETS
from tokenformer_jax.growth.layers import token_layers

ROOT = pathlib.Path(__file__).parent.parent


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]


def blocks(language: str, document: str = "README.md") -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)


def test_readme_python_api_runs():
  names = {}
  exec(blocks("python")[0], names)
  config = names["config"]
  assert names["logits"].shape == (1, 16, config.vocab_size)
  assert names["bigger"].config.ffn_tokens == 1024
  assert (names["bigger"](names["jnp"].ones((1, 8), int)) - names["model"](names["jnp"].ones((1, 8), int))).max() < 1e-5


def test_readme_begins_with_its_two_commands():
  quickstart, tests = blocks("bash")[:2]
  assert "experiments/quickstart.py" in quickstart and "pytest" in tests
  for command in (quickstart, tests):
    assert "-m venv" in command and "pip install" in command and "git clone" not in command


def test_a_model_of_ones_own_grows_without_changing_and_learns_on(capsys):
  names = {}
  exec(blocks("python", "docs/growing_your_own_model.md")[0], names)
  assert names["change"] < 1e-5 * np.abs(names["small"](names["points"])).max()
  assert names["bigger_loss"] < names["small_loss"]
  counts = {path: layer.num_tokens for path, layer in token_layers(names["wider"]).items()}
  assert counts == {"hidden/0": 48, "hidden/1": 64, "write": 32}
  assert names["report"].summary in (ROOT / "docs/growing_your_own_model.md").read_text(encoding="utf-8")


def test_an_architecture_of_ones_own_is_made_and_grows():
  presets, routers, own = blocks("python", "docs/architectures.md")
  names = {}
  exec(presets, names)
  exec(routers, names)
  assert names["bigger"].config.ffn == names["routed"].config.ffn and names["routed"].config.ffn.chosen == 4
  assert names["config"].attention.num_kv_heads == 2
  exec(own, names)
  assert names["logits"].shape == (1, 16, 384) and names["bigger"].config.ffn_tokens == 512
  document = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
  assert [name for name in PRESETS if f"`{name}`" not in document] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_files_modules_and_fields_that_exist(path):
  text = path.read_text(encoding="utf-8")
  linked = [path.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
  named = [ROOT / name for name in re.findall(r"\b(?:experiments|colabs)/[a-z_/]+\.\w+", text)]
  assert [str(file) for file in linked + named if not file.exists()] == []
  modules = re.findall(r"-m ((?:tokenformer_jax\.cli|tests|experiments)\.[a-z_]+)\b", text)
  assert [name for name in modules if importlib.util.find_spec(name) is None] == []
  fields = ml_collections.FrozenConfigDict(Config(model=ModelConfig.named("tiny")).to_dict())
  for field in re.findall(r"--config\.([\w.]+)", text):
    functools.reduce(getattr, field.rstrip(".").split("."), fields)


@pytest.mark.parametrize("module", ["train", "generate", "evaluate", "grow", "shrink", "convert", "prepare"])
def test_commands_in_documents_have_flags_that_exist(module):
  source = "".join(
    (ROOT / "tokenformer_jax" / "cli" / f"{name}.py").read_text(encoding="utf-8")
    for name in (module, "command", "mesh_flags", "process_flags", "resize_flags")
  )
  text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS).replace("\\\n", " ")
  for command in re.findall(rf"-m tokenformer_jax\.cli\.{module} ([^`\n&]*)", text):
    for flag in re.findall(r"--([\w.]+)", command):
      is_known = (
        flag.startswith("config.") or f'"{flag}"' in source or ("TOKEN_COUNTS" in source and flag in TOKEN_COUNTS)
      )
      assert is_known, f"{module} has no --{flag}"


@pytest.mark.parametrize(
  "path",
  [path for path in sorted(ROOT.glob("experiments/*.py")) if "def get_config(" in path.read_text(encoding="utf-8")],
  ids=lambda path: path.stem,
)
def test_an_experiment_is_a_configuration_for_the_train_command(path, monkeypatch):
  monkeypatch.setenv("TOKENFORMER_DATA", "data")
  before = set(flags.FLAGS)
  assert Config.from_dict(runpy.run_path(str(path))["get_config"]()).training.num_steps
  assert not {"workdir", "config", "profile"} & (set(flags.FLAGS) - before), (
    "its flags would collide with those of the CLI"
  )


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("colabs/*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(path, as_version=4)
  training = next(cell for cell in notebook.cells if "num_steps=200" in cell.source)
  for long, short in (
    ("num_steps=200", "num_steps=40"),
    ("step=100,", "step=20,"),
    ("decay_steps=50", "decay_steps=10"),
  ):
    assert long in training.source
    training.source = training.source.replace(long, short)  # The same cells with fewer updates.
  nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(cell.execution_count for cell in code)
  assert sum("image/png" in str(cell.outputs) for cell in code) >= 2
