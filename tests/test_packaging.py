"""What setup.py declares is what the package imports and what documents and messages name."""

import ast
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
# Import name -> distribution name, where they differ.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "orbax": "orbax-checkpoint",
  "sklearn": "scikit-learn",
  "yaml": "pyyaml",
}
# Imported only in functions whose error names the package.
NAMED_IN_ERRORS = {"datasets"}


def declared() -> dict[str, list[Requirement]]:
  """The requirements of each extra in setup.py; those of the package itself are under the name ''."""
  tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
  constants = {
    node.targets[0].id: node.value
    for node in tree.body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
  }

  def texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
      return texts(constants[node.id])
    elements = [
      texts(element.value) if isinstance(element, ast.Starred) else [ast.literal_eval(element)] for element in node.elts
    ]
    return [text for part in elements for text in part]

  (call,) = [
    node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setup")
  ]
  arguments = {keyword.arg: keyword.value for keyword in call.keywords}
  extras = arguments["extras_require"]
  lists = {"": arguments["install_requires"], **{ast.literal_eval(k): v for k, v in zip(extras.keys, extras.values)}}
  return {name: [Requirement(text) for text in texts(node)] for name, node in lists.items()}


DECLARED = declared()
REQUIRED = {canonicalize_name(requirement.name): requirement for requirement in DECLARED[""]}


def imports(path: pathlib.Path) -> set[tuple[str, bool]]:
  """The top-level packages that a module imports, each with whether this happens when the module is imported."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  inner = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    for node in ast.walk(function)
  }
  found = set()
  for node in ast.walk(tree):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
    found |= {(name.split(".")[0], id(node) not in inner) for name in names}
  return found


def undeclared(folder: str, extras: set[str]) -> set[str]:
  """The packages that files in `folder` import and that neither setup.py's requirements nor `extras` contain."""
  optional = {canonicalize_name(requirement.name) for extra in extras for requirement in DECLARED[extra]}
  return {
    name
    for path in (ROOT / folder).rglob("*.py")
    for name, at_import in imports(path)
    if name not in sys.stdlib_module_names | {"tokenformer_jax", "tests", "experiments"}
    and (distribution := canonicalize_name(DISTRIBUTIONS.get(name, name))) not in REQUIRED
    and (at_import or name not in NAMED_IN_ERRORS)
    and distribution not in optional
  }


def test_every_package_that_is_imported_is_declared():
  assert undeclared("tokenformer_jax", {"eval", "int8", "wandb", "zstd"}) == set()


def test_optional_packages_are_imported_only_where_they_are_needed():
  optional = {"qwix": "int8", "wandb": "wandb", "zstandard": "zstd"}
  early = {
    (name, path.name)
    for path in (ROOT / "tokenformer_jax").rglob("*.py")
    for name, at_import in imports(path)
    if name in optional and at_import
  }
  assert early == set()


def test_every_package_that_the_tests_import_is_declared():
  # These three come with pytest, the harness and a machine that has PyTorch; the tests that need torch skip without it.
  assert undeclared("tests", {"test", "eval"}) - {"packaging", "datasets", "torch"} == set()


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs", "experiments", "colabs", "tokenformer_jax"])
def test_every_extra_that_is_named_exists(path):
  paths = [ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*.*")
  texts = [p.read_text(encoding="utf-8") for p in paths if p.suffix in (".md", ".py", ".ipynb")]
  named = {
    extra.strip()
    for text in texts
    for group in re.findall(r"tokenformer_jax\[([\w, -]+)\]|-e\s+['\"]?\.\[([\w, -]+)\]|`\.\[([\w, -]+)\]", text)
    for extra in "".join(group).split(",")
  }
  assert named - DECLARED.keys() == set()


def test_the_tested_versions_are_those_of_all_required_packages():
  pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] != "#"]
  assert {canonicalize_name(pin.name) for pin in pins} == REQUIRED.keys()
  for pin in pins:
    (version,) = [specifier.version for specifier in pin.specifier]
    assert REQUIRED[canonicalize_name(pin.name)].specifier.contains(version), pin


def test_orbax_is_bounded_below_its_next_minor_version():
  """growth/stream.py uses internals of Orbax, which may change with every minor version."""
  assert REQUIRED["orbax-checkpoint"].specifier == SpecifierSet(">=0.12.8,<0.13")


def test_the_marker_of_typed_packages_is_installed():
  assert '"py.typed"' in (ROOT / "setup.py").read_text(encoding="utf-8")
  assert (ROOT / "tokenformer_jax" / "py.typed").is_file()
