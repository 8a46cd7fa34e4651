"""What the documents show is run: the README's Python, its commands' files, the notebooks."""

import pathlib
import re
import runpy

import nbclient
import nbformat
import pytest
from absl import flags

from tokenformer_jax.config import Config

ROOT = pathlib.Path(__file__).parent.parent


def blocks(language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


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


def test_readme_names_files_that_are_there():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  paths = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"\b(?:experiments|colabs)/[\w/]+\.\w+", text)
  assert paths and [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
  "path",
  [path for path in sorted(ROOT.glob("experiments/*.py")) if "def get_config(" in path.read_text(encoding="utf-8")],
  ids=lambda path: path.stem,
)
def test_experiment_is_a_configuration_for_the_train_door(path, monkeypatch):
  monkeypatch.setenv("TOKENFORMER_DATA", "data")
  before = set(flags.FLAGS)
  assert Config.from_dict(runpy.run_path(str(path))["get_config"]()).training.num_steps
  assert not {"workdir", "config", "profile"} & (set(flags.FLAGS) - before), "its flags would meet the door's"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("colabs/*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(cell.execution_count for cell in code)
  assert sum("image/png" in str(cell.outputs) for cell in code) >= 2
