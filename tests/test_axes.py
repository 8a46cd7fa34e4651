"""The table from logical to mesh axes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed import axes as axes_module
from tokenformer_jax.distributed.axes import (
  RULES,
  batch_sharding,
  constrain,
  replicated,
  sharding,
  splits,
  traced_on,
  tree_shardings,
  whole_heads,
)
from tokenformer_jax.distributed.mesh import MESH_AXES, make_mesh
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import logical_axes, split


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, token=2))


@pytest.mark.parametrize(
  "axes, spec",
  [
    (("param_token", "embed"), P("token", "fsdp")),
    (("layer", "param_token", "embed"), P(None, "token", "fsdp")),
    (("vocab", "embed"), P("token", "fsdp")),
    (("batch", None, "embed"), None),
    (("batch", None, "vocab"), P(("data", "fsdp"), None, "token")),
    (("batch", None, "heads", None), P(("data", "fsdp"), None, "token")),
    (("layer", "norm"), P()),
    ((), P()),
  ],
)
def test_specs(mesh, axes, spec):
  shape = (8,) * len(axes)
  if spec is None:
    with pytest.raises(ValueError, match=r"x: axes \(.*\) would use mesh axis 'fsdp' twice"):
      sharding(mesh, axes, shape, "x")
  else:
    assert sharding(mesh, axes, shape, "x").spec == spec


def test_table_names_only_axes_of_the_mesh():
  assert {axis for mesh_axes in RULES.values() for axis in mesh_axes} == set(MESH_AXES)


def test_every_parameter_of_a_model_has_its_place(mesh):
  """Every array is split along every mesh axis that the table gives it, and nothing large is replicated."""
  model = nnx.eval_shape(lambda: LanguageModel(ModelConfig.named("tiny", vocab_size=384), rngs=nnx.Rngs(0)))
  _, *trees = split(model)
  placed = [tree_shardings(mesh, axes, shapes) for axes, shapes in zip(logical_axes(model), trees)]
  for shapes, shardings in zip(trees, placed):
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
      copies = np.prod(place.shard_shape(leaf.shape)) * 4 / leaf.size if leaf.ndim > 1 else 1
      assert copies == 1, (leaf.shape, place)


def test_a_step_is_not_compiled_again_for_its_own_output():
  axes = {"embedding": ("vocab", "embed"), "keys": ("layer", "param_token", "embed"), "scale": ("norm",)}
  for config in (MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, token=2)):
    arrays = {name: jnp.ones((8,) * len(axes[name])) for name in axes}
    arrays = jax.device_put(arrays, tree_shardings(make_mesh(config), axes, arrays))
    step = jax.jit(lambda arrays: jax.tree.map(lambda a: 0.5 * a, arrays))
    step(step(arrays))
    assert step._cache_size() == 1


def test_batches(mesh):
  assert batch_sharding(mesh, (8, 16)).spec == P(("data", "fsdp"))
  assert batch_sharding(mesh, (8, 16)).shard_shape((8, 16)) == (2, 16)
  assert replicated(mesh).spec == P()


@pytest.mark.parametrize(
  "axes, shape, message",
  [
    (
      ("vocab", "embed"),
      (257, 8),
      r"vocab=257 cannot be split over the 2 devices along mesh axis token of mesh "
      r"\{'data': 2, 'fsdp': 2, 'sequence': 1, 'token': 2\}; the nearest sizes that can: 256 or 258",
    ),
    (("vocab", "embed"), (8, 7), "embed=7 .* along mesh axis fsdp .*: 6 or 8"),
    (("batch", None), (3, 8), "batch=3 cannot be split over the 4 devices along mesh axis data × fsdp .*: 4"),
    (("vocab", "embd"), (8, 8), "logical axis 'embd' is unknown: .* Did you mean 'embed'?"),
    (("vocab",), (8, 8), r"axes \('vocab',\) and shape \(8, 8\) differ in length"),
  ],
)
def test_refusals_name_leaf_axes_and_way_out(mesh, axes, shape, message):
  with pytest.raises(ValueError, match=message) as error:
    sharding(mesh, axes, shape, "embedding")
  assert str(error.value).startswith("embedding: ")


def test_refusals_name_the_path_in_a_tree(mesh):
  with pytest.raises(ValueError, match="blocks/ffn/keys: param_token=7 "):
    tree_shardings(
      mesh, {"blocks": {"ffn": {"keys": ("param_token", "embed")}}}, {"blocks": {"ffn": {"keys": jnp.ones((7, 8))}}}
    )


@pytest.fixture
def said(monkeypatch, caplog):
  """What the log says about axes, from an empty record of what was said before."""
  monkeypatch.setattr(axes_module, "_SAID", set())
  return lambda: [record.getMessage() for record in caplog.records if record.name == axes_module.__name__]


def test_what_stays_whole_is_logged_once(mesh, said):
  traced = traced_on(mesh, lambda x: constrain(x, "batch", None, "heads") + (splits("batch", 6) == ()))
  for rows in (6, 6, 8, 1):  # A single row is nothing to split.
    jax.eval_shape(traced, jnp.ones((rows, 3, 2)))
  message = (
    "batch=6 cannot be split over the 4 devices along mesh axis data × fsdp: it stays whole on each, and each does all "
    "of the work along it."
  )
  assert said() == [message]
  wider = make_mesh(MeshConfig(data=8))
  jax.eval_shape(traced_on(wider, lambda x: constrain(x, "batch")), jnp.ones(6))
  assert said() == [message, message.replace("the 4", "the 8").replace("data × fsdp", "data")]


def test_heads_that_a_run_has_told_of_are_not_logged_again(said):
  mesh = make_mesh(MeshConfig(token=8))
  assert "3 heads cannot be split" in whole_heads(mesh, 3)
  jax.eval_shape(traced_on(mesh, lambda x: constrain(x, "heads")), jnp.ones(3))
  assert said() == []
