"""Outputs equal those of other implementations within 2e-5, and gradients within 1e-5 of the largest gradient."""

import json
import tarfile

import numpy as np
import pytest

from tests import oracle, parity_simplified, parity_table, parity_tokenformer
from tests.golden_files import GOLDEN, golden, read, under
from tokenformer_jax.config import ModelConfig

CASES = golden("pattention_A").description["cases"]


def check(row):
  assert row.passes and not row.missing, row


@pytest.fixture(scope="module")
def simplified(tmp_path_factory):
  """The folder of the original simplified blocks' files."""
  folder = tmp_path_factory.mktemp("simplified_blocks")
  with tarfile.open(GOLDEN / "simplified_blocks.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_pattention(case):
  check(parity_tokenformer.pattention_row(golden("pattention_A"), case))


def test_layer():
  check(parity_tokenformer.layer_row(golden("layer_A")))


def test_language_model():
  check(parity_tokenformer.language_model_row(golden("lm_A")))


@pytest.mark.parametrize("size", ["small", "grown"])
def test_model_of_the_original_growth(size):
  check(parity_tokenformer.growth_row(golden("growth_A"), size))


@pytest.mark.parametrize(
  "name, preset",
  [("A_sas_rand", "sas"), ("A_sasp_nonorm_rand", "sas-p-no-norm"), ("A_vskipinit_eq4_rand", "v-skipinit-eq4")],
)
def test_presets_are_the_original_settings(simplified, name, preset):
  config = parity_simplified.model_config(read(simplified / f"{name}.npz").description)
  fields = ("vocab_size", "num_layers", "hidden_size", "num_heads", "ffn_tokens", "seq_length")
  assert config == ModelConfig.named("tiny", preset, **{field: getattr(config, field) for field in fields})


@pytest.mark.parametrize("name", ["A_sas_rand", "A_sasp_nonorm_rand", "A_vskipinit_eq4_rand"])
def test_simplified_block(simplified, name):
  (row,) = parity_table.rows_of(simplified / f"{name}.npz")
  check(row)


def test_sixty_steps_of_a_simplified_block(simplified):
  (row,) = parity_table.rows_of(simplified / "A_sas_train60.npz")
  assert row.output < 1e-5, row


def test_the_same_parameters_are_decayed_as_in_the_original(simplified):
  file = read(simplified / "A_sas_train60.npz")
  groups = json.loads(str(file.arrays["groups_json"]))
  start = under(file.arrays, "param_start/")
  decayed = {name: np.full_like(array, name in groups["decay"]) for name, array in start.items()}
  config = parity_simplified.model_config(file.description)
  for path, (ours, theirs) in parity_simplified.decayed(config, decayed).items():
    assert np.all(theirs == ours), path


def write(folder, name, description, **arrays):
  np.savez(folder / f"{name}.npz", meta_json=np.array(json.dumps(description)), **arrays)


def test_the_table_says_what_has_no_model_and_fails_where_asked(tmp_path, simplified, capsys):
  write(tmp_path, "other", {"architectures": ["OtherModel"]}, logits=np.zeros(3))
  settings = read(simplified / "A_sas_rand.npz").description
  settings["block_cfg"]["qk_norm_type"] = "rmsnorm"
  write(tmp_path, "part", settings, logits=np.zeros(3))
  assert parity_table.main([str(tmp_path)]) == 0
  printed = capsys.readouterr().out
  assert "| other | no model for OtherModel | – |" in printed
  assert "| part | no part for qk_norm_type='rmsnorm' | – |" in printed
  assert parity_table.main([str(tmp_path), "--strict"]) == 1
  assert parity_table.main([str(tmp_path / "nowhere")]) == 2


def test_the_table_fails_where_an_error_is_over_its_bound(tmp_path, capsys):
  """The exit code is 1 and the row shows the bound; NaN is an error too."""
  file = golden("growth_A")
  for name, wrong in (("off", 1.0), ("nan", np.nan)):
    np.savez(tmp_path / f"{name}.npz", **{**file.arrays, "logits_small": file.arrays["logits_small"] + wrong})
    (tmp_path / f"{name}.json").write_text(json.dumps(file.description))
  assert parity_table.main([str(tmp_path)]) == 1
  printed = capsys.readouterr().out
  assert "| off small | **1.0e+00** > 2e-05 | – |" in printed
  assert "| nan small | **nan** > 2e-05 | – |" in printed


def test_the_oracle_equals_the_released_model():
  """Where there is no golden file, tests compare with the oracle, so the oracle must agree with the released code."""
  _, a, meta = golden("lm_A")
  config = parity_tokenformer.model_config(meta["config"])
  arrays = oracle.wide(under(a, "param/"))
  # The rotary table of the released code is float32; everything else is float64.
  np.testing.assert_allclose(oracle.language_model(arrays, a["tokens"], config), a["logits__f64"], atol=2e-7)

  rng = np.random.default_rng(0)
  for name, array in arrays.items():
    direction = rng.normal(size=array.shape)
    slope = oracle.slope(
      lambda x: oracle.cross_entropy(oracle.language_model({**arrays, name: x}, a["tokens"], config), a["labels"]),
      array,
      direction,
    )
    np.testing.assert_allclose(slope, np.sum(a[f"grad/{name}__f64"] * direction), atol=1e-7, err_msg=name)
