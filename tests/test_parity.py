"""Outputs equal those of the released code within 2e-5, and gradients within 1e-5 of the largest gradient."""

import numpy as np
import pytest

from tests import oracle, parity_table


def check(row):
  assert row.output < 2e-5
  assert row.gradient is None or row.gradient < 1e-5


@pytest.mark.parametrize("case", parity_table.pattention_cases(), ids=lambda case: case["name"])
def test_pattention(case):
  check(parity_table.pattention_row(case))


def test_layer():
  check(parity_table.layer_row())


def test_language_model():
  check(parity_table.language_model_row())


@pytest.mark.parametrize("size", ["small", "grown"])
def test_model_of_the_original_growth(size):
  check(parity_table.growth_row(size))


def test_the_oracle_equals_the_released_model():
  """Where there is no golden file, tests compare with the oracle, so the oracle must agree with the released code."""
  a, meta = parity_table.golden("lm_A")
  config = parity_table.model_config(meta["config"])
  arrays = oracle.wide(parity_table.under(a, "param/"))
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
