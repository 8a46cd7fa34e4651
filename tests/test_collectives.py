"""Collectives of compiled programs: their axes, bytes, trips and origin."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import small_run
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.distributed.hlo import parse

MESH = functools.partial(small_run.mesh, 2, 2, 2)


def sent(body, *specs, shape=(4, 8, 16), dtype=jnp.float32):
  """The collectives of `body` run on each device's part of one array; `specs` are those of its input and output."""
  mesh = MESH()
  f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False))
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[0]))
  return collectives(f.lower(x).compile().as_text(), mesh)


@pytest.mark.parametrize(
  "axes", [("data",), ("fsdp",), ("token",), ("data", "token"), ("data", "fsdp", "token")], ids=str
)
def test_axes_of_every_kind(axes):
  """All operands are [4, 4, 16] on a device, and the larger side counts."""
  size, whole, n = 4 * 4 * 16, P(None, "fsdp"), 2 ** len(axes)
  for kind, body, elements, sends in [
    ("all-reduce", lambda x: jax.lax.psum(x, axes), size, 2 * (n - 1) / n),
    ("all-gather", lambda x: jax.lax.all_gather(x, axes, tiled=True, axis=2), size * n, (n - 1) / n),
  ]:
    (found,) = sent(body, whole, P())
    assert (found.kind, found.axes, found.group_size) == (kind, axes, n)
    assert (found.dtype, found.bytes, found.trips) == ("f32", 4 * elements, 1)
    assert found.bytes_sent == sends * 4 * elements


def test_kinds_of_one_axis():
  (scattered,) = sent(lambda x: jax.lax.psum_scatter(x, "token", scatter_dimension=2, tiled=True), P("data"), P("data"))
  assert (scattered.kind, scattered.axes, scattered.bytes) == ("reduce-scatter", ("token",), 4 * 2 * 8 * 16)
  (permuted,) = sent(lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), P("data"), P("data"), dtype=jnp.int32)
  assert (permuted.kind, permuted.axes, permuted.bytes_sent) == ("collective-permute", ("fsdp",), 4 * 2 * 8 * 16)
  (exchanged,) = sent(lambda x: jax.lax.all_to_all(x, "data", 1, 2), P(None), P(None), shape=(4, 2, 16))
  assert (exchanged.kind, exchanged.axes, exchanged.bytes) == ("all-to-all", ("data",), 4 * 4 * 2 * 16)


def test_arrays_that_are_sent_together_are_counted_one_by_one():
  def body(x):
    return jax.lax.psum(x, "token"), jax.lax.psum(2 * x[0, 0], "token")

  found = sent(body, P("data"), P("data"))
  assert sorted(c.bytes for c in found) == [4 * 16, 4 * 2 * 8 * 16]
  assert len({c.operation for c in found}) == 1


def test_loops_arguments_and_gradients_are_recognised():
  """A scan gathers each layer of its weights as fsdp does: what is gathered is the argument, in bfloat16."""
  mesh = MESH()

  def loss(weights, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), NamedSharding(mesh, P()))
      return x + jnp.sin(x @ w.astype(jnp.float32)), None

    return jnp.sum(jax.lax.scan(layer, x, weights)[0])

  where = {
    name: NamedSharding(mesh, P(*spec)) for name, spec in {"weights": (None, "token", "fsdp"), "x": ("data",)}.items()
  }
  shapes = {"weights": (3, 16, 16), "x": (8, 16)}
  arguments = [jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=where[name]) for name in shapes]
  text = jax.jit(jax.grad(loss), out_shardings=where["weights"]).lower(*arguments).compile().as_text()
  found = collectives(text, mesh)
  gathers = [c for c in found if c.kind == "all-gather" and not c.backward]
  assert gathers and all(c.trips == 3 and c.in_loop for c in gathers)
  assert {axis for c in gathers for axis in c.axes} == {"token", "fsdp"}
  assert "weights" in {c.argument for c in gathers}
  sums = [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]
  assert sums and all(c.backward and c.argument is None and "data" in c.axes for c in sums)


HEAD = 'ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0), metadata={op_name="x"}\n'


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
    ("{{0,1,4,5},{2,3,6,7}}", ("data", "token")),
    ("{}", ("data", "fsdp", "token")),
    ("[4,2]<=[8]", ("token",)),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "token")),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", ("fsdp",)),
    ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'b'}", ("token",)),
  ],
)
def test_groups_in_every_notation_of_xla(groups, axes):
  text = HEAD + f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n"
  text = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n" + text
  (found,) = collectives(text, MESH())
  assert (found.axes, found.group_size, found.argument) == (axes, 2 ** len(axes), "x")


def test_a_collective_that_the_tpu_compiler_spread_over_computations_counts_once():
  """It is repeated in the body of a loop that it only overlaps; another chain number is another collective."""
  gather = (
    '  {root}%g{n} = f32[8]{{0}} all-gather(%{x}), replica_groups=[4,2]<=[8], frontend_attributes={{chain_id="{n}"}}\n'
  )
  body = (
    "%body (b: f32[4]) -> f32[4] {\n  %b = f32[4]{0} parameter(0)\n"
    + gather.format(n=1, x="b", root="")
    + gather.format(n=2, x="b", root="")
    + "  ROOT %c = f32[4]{0} copy(%b)\n}\n"
  )
  loop = '  %w = f32[4]{0} while(%p), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"12"}}\n'
  text = body + HEAD + loop + gather.format(n=1, x="p", root="ROOT ") + "}\n"
  assert {c.operation: c.trips for c in collectives(text, MESH())} == {"g1": 1, "g2": 12}


def test_a_reduce_scatter_of_the_tpu_compiler_is_a_fusion_with_the_name_of_its_origin():
  body = (
    "%all-reduce-scatter.1 (i: f32[4]) -> f32[2] {\n  %i = f32[4]{0} parameter(0)\n"
    "  %a = f32[4]{0} all-reduce(%i), replica_groups=[4,2]<=[8], to_apply=%add\n"
    "  ROOT %s = f32[2]{0} slice(%a), slice={[0:2]}\n}\n"
  )
  add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
  fusion = (
    "  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, "
    'metadata={op_name="transpose(jvp())/dot"}\n}\n'
  )
  (found,) = collectives(add + body + HEAD + fusion, MESH())
  assert (found.kind, found.backward, found.axes, found.bytes, found.argument) == (
    "reduce-scatter",
    True,
    ("token",),
    16,
    "x",
  )


@pytest.mark.parametrize("limit, stride, trips", [(8, 1, 8), (8, 2, 4), (7, 2, 4)])
def test_a_loop_whose_counter_grows_by_more_than_one(limit, stride, trips):
  """The TPU compiler writes a product that it cut into windows like this."""
  text = (
    f"%body (b: (u32[], f32[4])) -> (u32[], f32[4]) {{\n  %b = (u32[], f32[4]) parameter(0)\n"
    f"  %n = u32[] get-tuple-element(%b), index=0\n  %s = u32[] constant({stride})\n"
    "  %m = u32[] add(%n, %s)\n  %x = f32[4]{0} get-tuple-element(%b), index=1\n"
    "  %r = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}\n"
    "  ROOT %t = (u32[], f32[4]) tuple(%m, %r)\n}\n"
    "%cond (c: (u32[], f32[4])) -> pred[] {\n  %c = (u32[], f32[4]) parameter(0)\n"
    f"  %k = u32[] get-tuple-element(%c), index=0\n  %l = u32[] constant({limit})\n"
    "  ROOT %lt = pred[] compare(%k, %l), direction=LT\n}\n"
    "ENTRY %main (p: (u32[], f32[4])) -> (u32[], f32[4]) {\n  %p = (u32[], f32[4]) parameter(0)\n"
    "  ROOT %w = (u32[], f32[4]) while(%p), condition=%cond, body=%body\n}\n"
  )
  assert [c.trips for c in collectives(text, MESH())] == [trips]


def test_text_that_cannot_be_read_is_refused():
  with pytest.raises(ValueError, match="r: its groups of devices cannot be read"):
    collectives(HEAD + "  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=?\n}\n", MESH())
  with pytest.raises(ValueError, match="not the text of a compiled program"):
    parse("")
  mesh = MESH()
  f = jax.shard_map(
    lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: jax.lax.psum(x, "token"), x),
    mesh=mesh,
    in_specs=P(),
    out_specs=P(),
    check_vma=False,
  )
  text = jax.jit(f).lower(jnp.ones(8)).compile().as_text()
  with pytest.raises(ValueError, match="its number of trips is not a constant of the program"):
    collectives(text, mesh)
