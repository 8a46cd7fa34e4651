"""Mixtures of experts: the originals' numbers, static shapes and FLOPs, and no token that depends on another's choice."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_interop_pretrained import save
from tokenformer_jax.config import Config, MeshConfig, ModelConfig
from tokenformer_jax.config.parts import FeedForwardConfig
from tokenformer_jax.distributed import axes, mesh
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.interop.export import export
from tokenformer_jax.interop.hugging_face import model_from, to_hugging_face
from tokenformer_jax.interop.hugging_face_config import model_config
from tokenformer_jax.interop.pretrained import from_pretrained
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.kernels.grouped import grouped_row_products, grouped_weighted_sums, make_groups
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.experts import Experts
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import recorded_inputs
from tokenformer_jax.training.flops import product_flops
from tokenformer_jax.training.program import make_program

GOLDEN = pathlib.Path(__file__).parent / "golden"
SIZES = dict(vocab_size=96, num_layers=2, hidden_size=32, num_heads=4, ffn_tokens=48, seq_length=32)


def context(time, **fields):
  return Context(jnp.arange(time)[None], **fields)


def experts(preset="mixtral", **ffn):
  config = ModelConfig.named("tiny", preset, **SIZES)
  return Experts(dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, **ffn)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("padded", [True, False], ids=["blocks", "ragged_dot"])
@pytest.mark.parametrize("num_rows", [3, 50])
def test_products_of_groups_are_those_of_each_row_alone(padded, num_rows):
  rng = np.random.default_rng(0)
  group = jnp.asarray(rng.choice([0, 1, 3, 4], num_rows))  # The third of four groups is empty, and 4 is none.
  x, keys, values = (
    jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for shape in [(num_rows, 8), (4, 6, 8), (4, 6, 5)]
  )

  def grouped(x, keys, values):
    groups = make_groups(group, 4, padded)
    return groups.unsort(grouped_weighted_sums(grouped_row_products(groups.sort(x), keys, groups), values, groups))

  def alone(x, keys, values):
    y = jnp.einsum("md,mnd,mne->me", x, keys[group % 4], values[group % 4])
    return jnp.where(group[:, None] < 4, y, 0.0)

  def with_gradient(function):
    return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=(0, 1, 2)))

  ours, theirs = (with_gradient(function)(x, keys, values) for function in (grouped, alone))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5), ours, theirs)


def test_flops_are_those_of_the_chosen_experts():
  layer = experts(experts=8, chosen=2)
  graphdef, state = nnx.split(layer)
  x = jnp.zeros((4, 256, 32))
  traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, context(256))[0]).trace(state, x)
  one_expert = 2 * 4 * 256 * 3 * 48 * 32
  router = 2 * 4 * 256 * 8 * 32
  assert 2.0 * one_expert <= product_flops(traced.jaxpr) - router <= 1.3 * 2 * one_expert


def test_switch_equals_the_original_but_for_dropped_tokens():
  a = np.load(GOLDEN / "switchA_hf4463.npz")
  layer = experts("switch", experts=4, capacity=0.7)
  assert layer.capacity(17) == json.loads(str(a["meta_json"]))["expert_capacity"]
  layer.router[...] = a["param/router.classifier.weight"]
  layer.keys[...] = np.stack([a[f"param/experts.expert_{e}.wi.weight"] for e in range(4)])
  layer.values[...] = np.stack([a[f"param/experts.expert_{e}.wo.weight"].T for e in range(4)])
  graphdef, state = nnx.split(layer)
  y, said = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, context(17, training=True)))(state, a["x"])
  expected = np.where(a["dropped"][:, :, None], 0.0, a["y"])  # There a dropped token gives probability · x.
  np.testing.assert_allclose(y, expected, atol=2e-6)
  np.testing.assert_allclose(said["loss/router_z"], 0.001 * a["z_loss"], rtol=1e-5)
  np.testing.assert_allclose(said["router/dropped"], a["dropped"].mean(), rtol=1e-5)
  # The original multiplies the shares of each sequence by itself.
  chance = np.exp(a["router_logits"]) / np.exp(a["router_logits"]).sum(axis=-1, keepdims=True)
  load = np.eye(4)[chance.argmax(axis=-1)]
  pooled = 4 * np.sum(load.mean(axis=(0, 1)) * chance.mean(axis=(0, 1)))
  np.testing.assert_allclose(said["loss/balance"], 0.01 * pooled, rtol=1e-5)
  of_sequences = 4 * np.sum(load.mean(axis=1) * chance.mean(axis=1), axis=-1).mean()
  np.testing.assert_allclose(of_sequences, a["lb_loss"], rtol=1e-5)


@pytest.fixture(scope="module")
def mixtral():
  """(all arrays, config.json, parameters) of the golden model, under the names of transformers."""
  arrays = dict(np.load(GOLDEN / "mixtralA_hf4463.npz"))
  parameters = {name[6:]: array for name, array in arrays.items() if name.startswith("param/")}
  return arrays, json.loads(str(arrays["meta_json"])), parameters


def test_a_mixtral_folder_is_read_onto_a_mesh_and_written_back(mixtral, tmp_path):
  _, fields, parameters = mixtral
  (tmp_path / "config.json").write_text(json.dumps(fields))
  save(tmp_path / "model.safetensors", parameters)
  devices = mesh.make_mesh(MeshConfig(token=2, fsdp=2), devices=jax.devices()[:4])
  model, expected = from_pretrained(tmp_path, mesh=devices), model_from(fields, parameters)
  assert model.config == expected.config and model.config.ffn.experts == 4
  jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(expected)[1])
  np.testing.assert_array_equal(
    model.blocks.ffn.values[...][1, 2].T, parameters["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
  )
  assert model.blocks.ffn.keys[...].sharding.spec == jax.sharding.PartitionSpec(None, "token", None, "fsdp")
  written = export(expected, tmp_path / "written" / "model.safetensors").path
  assert model_config(json.loads((tmp_path / "written" / "config.json").read_text())) == expected.config
  arrays = open_weights(written).arrays
  assert arrays.keys() == parameters.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array.read(), parameters[name], err_msg=name)


def test_mixtral_equals_the_original(mixtral):
  """Logits, loss and gradients, with the original's balance loss, whose shares are those over all layers together."""
  a, fields, parameters = mixtral
  graphdef, params, _ = split(model_from(fields, parameters))
  ids = jnp.asarray(a["input_ids"])

  def apply(block, x, context):
    with recorded_inputs() as recorded:
      x, _, said = block(x, context.observed())
    ((layer, normed),) = recorded
    return x, (layer.scores(normed), said["loss/balance"])

  def loss(params):
    model = nnx.merge(graphdef, params, {})
    hidden, observed = model.through_layers(apply, ids)
    logits = model.logits(hidden)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    scores, balance = observed["blocks"]
    chance = jax.nn.softmax(scores.reshape(-1, 4))
    taken = jax.nn.one_hot(jax.lax.top_k(chance, 2)[1], 4)
    pooled = 4 * jnp.sum(jnp.mean(taken, axis=0) * jnp.mean(chance, axis=0)[None])
    return jnp.mean(nats) + 0.02 * pooled, (logits, scores, pooled, balance)

  (total, (logits, scores, pooled, balance)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, a["logits"], atol=2e-5)
  np.testing.assert_allclose(scores.reshape(2, -1, 4)[1], a["router_logits/1"], atol=2e-5)
  np.testing.assert_allclose([total, pooled], [a["loss_total"], a["aux_loss"]], rtol=1e-6)
  gradients = to_hugging_face(grads, fields)
  largest = max(np.abs(a[f"grad/{name}"]).max() for name in gradients)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, a[f"grad/{name}"], atol=1e-5 * largest, err_msg=name)
  # Ours is the mean over the layers of what each has by itself, and 1 where all experts get as much.
  of_layers = [4 / 2 * np.sum(np.mean(jax.nn.one_hot(jax.lax.top_k(s, 2)[1], 4), axis=0).sum(0) * jax.nn.softmax(s).mean(0))
               for s in scores.reshape(2, -1, 4)]  # fmt: skip
  np.testing.assert_allclose(balance, 0.01 * np.array(of_layers), rtol=1e-5)


@pytest.fixture(scope="module")
def half_capacity():
  """(function of x, real, training) of a layer whose experts have half of the capacity that they would need."""
  graphdef, state = nnx.split(experts(experts=4, capacity=0.5, kind="gated"))
  return jax.jit(
    lambda x, real, training: nnx.merge(graphdef, state)(x, context(x.shape[1], real=real, training=training)),
    static_argnums=2,
  )


def test_outside_of_training_no_token_is_dropped_or_depends_on_another(half_capacity):
  x = jax.random.normal(jax.random.key(0), (3, 8, 32))
  everyone = jnp.ones(x.shape[:2], bool)
  y, said = half_capacity(x, everyone, False)
  np.testing.assert_allclose(y[1:2, 3:4], half_capacity(x[1:2, 3:4], everyone[1:2, 3:4], False)[0], atol=1e-7)
  assert said["router/dropped"] == 0 and np.abs(y).min(axis=-1).all()
  trained, said = half_capacity(x, everyone, True)
  assert said["router/dropped"] > 0.4
  # Neither does an earlier token depend on a later one's choice.
  later = half_capacity(x.at[:, 5:].set(0.0), everyone, True)[0]
  np.testing.assert_array_equal(later[:, :3], trained[:, :3])


def test_padding_counts_nowhere_and_takes_no_room(half_capacity):
  x = jax.random.normal(jax.random.key(0), (2, 8, 32))
  real = jnp.arange(8)[None] < jnp.array([[5], [8]])
  said = half_capacity(x, real, True)[1]
  other = half_capacity(jnp.where(real[:, :, None], x, 7.0), real, True)
  jax.tree.map(np.testing.assert_array_equal, said, other[1])


def test_no_ops_give_nothing_and_are_no_load():
  graphdef, state = nnx.split(experts("switch", experts=2, no_ops=1, capacity=0.0))
  x = jax.random.normal(jax.random.key(0), (1, 9, 32))

  @jax.jit
  def both(state):
    layer = nnx.merge(graphdef, state)
    one = layer(x, context(9))
    layer.router[...] = layer.router[...].at[2].multiply(0.5)
    return *one, layer(x, context(9))[1], layer.scores(x)

  y, said, other, scores = both(state)
  chosen = np.argmax(np.asarray(scores) * np.array([1, 1, 2]), axis=-1)
  assert {0, 1, 2} == set(chosen.flatten().tolist())
  np.testing.assert_array_equal(np.any(y != 0, axis=-1), chosen < 2)
  np.testing.assert_allclose(said["router/no_op"], np.mean(chosen == 2), rtol=1e-6)
  assert other["router/no_op"] != said["router/no_op"]


@pytest.mark.parametrize("token, fsdp", [(4, 2)])
def test_devices_that_split_the_experts_give_the_same_without_gathering_them(token, fsdp):
  layer = experts(experts=4)
  graphdef, params = nnx.split(layer)
  params = nnx.to_pure_dict(params)
  x = jax.random.normal(jax.random.key(0), (4, 6, 32))

  def loss(params, x):
    y, said = nnx.merge(graphdef, params)(x, context(6))
    return jnp.sum(jnp.sin(y)) + said["loss/balance"]

  step = jax.value_and_grad(loss, argnums=(0, 1))
  expected = jax.jit(step)(params, x)
  devices = mesh.make_mesh(MeshConfig(token=token, fsdp=fsdp))
  names = {"router": (None, "router")} | dict.fromkeys(("keys", "values", "gates"), ("expert", "param_token", "embed"))
  shardings = axes.tree_shardings(devices, names, params), axes.batch_sharding(devices, x.shape)
  assert shardings[0]["keys"].spec == jax.sharding.PartitionSpec("token", None, "fsdp")
  compiled = jax.jit(axes.traced_on(devices, step), in_shardings=shardings).lower(params, x).compile()
  ours = compiled(*jax.tree.map(jax.device_put, (params, x), shardings))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), ours, expected)
  assert "f32[4,48,32]" not in compiled.as_text()  # No device ever holds all experts.
  # The output of each token is added up once, and its gradient once.
  sent = [one for one in collectives(compiled.as_text(), devices) if one.axes == ("token",) and one.shape[-1] == 32]
  assert [(one.kind, one.shape) for one in sent] == [("all-reduce", (2, 6, 32))] * 2
  assert "f32[1,48,32]" in compiled.as_text()


def test_rows_of_an_expert_need_not_divide_among_the_devices():
  model = ModelConfig.named("tiny", "mixtral", **SIZES | dict(ffn_tokens=7))
  shapes = make_program(Config(model=model), model, mesh.make_mesh(MeshConfig(token=4, data=2))).shapes
  assert shapes.born["blocks"]["ffn"]["keys"].sharding.is_fully_replicated
  assert shapes.params["blocks"]["ffn"]["keys"].sharding.shard_shape((2, 8, 7, 32)) == (2, 2, 7, 32)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(experts=4, chosen=5), "chosen=5: there are only experts=4"),
    (dict(chosen=2), "chosen=2: experts=1 has no router"),
    (dict(experts=4, renormalise=True), "renormalise=True: with chosen=1"),
    (dict(experts=4, chosen=2, bias=True), "bias=True: experts=4 have no biases"),
    (dict(experts=4, chosen=2, capacity=-1.0), "capacity=-1.0: must be at least 0"),
  ],
)
def test_bad_choices_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    FeedForwardConfig(kind="mlp", **fields)
