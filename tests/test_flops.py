"""Model FLOP utilisation: the FLOPs that the model needs, and the peak of the devices."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests import small_run
from tokenformer_jax import data
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.flops import peak_flops, product_flops, update_flops_per_token
from tokenformer_jax.training.objective import objective_of


def devices(kind, count):
  device = types.SimpleNamespace(platform="tpu", device_kind=kind)
  return types.SimpleNamespace(devices=np.full(count, device))


@pytest.mark.parametrize(
  "kind, tera",
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
  ],
)
def test_published_peaks_count_every_chip(kind, tera):
  assert peak_flops(devices(kind, (2, 2, 1))) == 4 * tera * 1e12


def test_an_unknown_device_has_no_peak():
  assert peak_flops(devices("TPU v99", 4)) is None


def test_a_cpus_peak_is_measured_once_for_all_simulated_devices():
  # One core reaches more than a GFLOP/s and less than ten TFLOP/s.
  assert 1e9 < peak_flops(small_run.mesh(data=8)) < 64 * 1e13


def test_forward_flops_are_those_of_the_products_in_the_program():
  model = small_run.MODEL
  graphdef, *shapes = split(abstract_model(model))
  tokens = jax.ShapeDtypeStruct((3, model.seq_length), "int32")
  forward = jax.make_jaxpr(lambda params, tau, tokens: nnx.merge(graphdef, params, tau)(tokens))(*shapes, tokens)
  # All attention scores are computed, of which half are needed.
  needless = model.num_layers * 2 * model.seq_length * model.hidden_size
  assert product_flops(forward) == tokens.size * (model.forward_flops_per_token + needless)


def test_logits_of_masked_tokens_alone_are_counted():
  model = dataclasses.replace(small_run.MODEL, task="masked_token")
  config = small_run.replace(dataclasses.replace(small_run.config(), model=model), data=dict(mask_rate=0.5))
  graphdef, *shapes = split(abstract_model(model))
  batch = data.empty_batch(config)
  loss = jax.make_jaxpr(
    lambda params, tau, batch: objective_of(model).loss(nnx.merge(graphdef, params, tau), batch, 0.0, True)[0]
  )(*shapes, batch)
  assert batch.places.shape == (8, 8)
  assert product_flops(loss) == batch.inputs.size * update_flops_per_token(model, 0.5) / 3


def test_products_are_counted_as_often_as_they_run():
  def program(x):
    x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(jax.jit(lambda x: x @ x))(x), None), x, None, length=5)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  x = jax.ShapeDtypeStruct((4, 4), "float32")
  assert product_flops(jax.make_jaxpr(program)(x)) == (5 + 2) * 2 * 4**3
  rows = PartitionSpec("data")
  per_device = jax.shard_map(lambda x: x @ x.T, mesh=small_run.mesh(data=8), in_specs=rows, out_specs=rows)
  assert product_flops(jax.make_jaxpr(per_device)(np.ones((8, 3)))) == 8 * 2 * 3
