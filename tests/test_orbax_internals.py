"""The internals of Orbax that growth/stream.py uses, so that a new version of Orbax fails here and says what changed."""

import asyncio
import dataclasses
import inspect

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers


@pytest.mark.parametrize(
  "function, positional, keywords",
  [
    (type_handlers.get_json_tspec_read, 1, ["use_ocdbt"]),
    (
      type_handlers.get_json_tspec_write,
      1,
      ["use_ocdbt", "global_shape", "local_shape", "dtype", "process_index", "arg"],
    ),
    (type_handlers.create_type_handler_registry, 2, []),
    (type_handlers.ArrayHandler, 0, ["array_metadata_store"]),
    (type_handlers.NumpyHandler, 0, []),
    (type_handlers.NumpyHandler.metadata, 2, []),
    (type_handlers.ParamInfo.await_path_creation, 1, []),
    (ocp.PyTreeCheckpointHandler, 0, ["type_handler_registry"]),
    (ocp.SaveArgs, 0, ["shard_axes"]),
  ],
  ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_function_takes_the_arguments_that_are_passed(function, positional, keywords):
  inspect.signature(function).bind(*[None] * positional, **dict.fromkeys(keywords))


def test_a_type_handler_needs_only_the_methods_that_are_defined():
  methods = {"typestr": ["self"], "metadata": ["self", "infos"]}
  methods |= {"serialize": ["self", "values", "infos", "args"], "deserialize": ["self", "infos", "args"]}
  assert type_handlers.TypeHandler.__abstractmethods__ == methods.keys()
  for name, parameters in methods.items():
    method = getattr(type_handlers.TypeHandler, name)
    assert list(inspect.signature(method).parameters) == parameters
    assert inspect.iscoroutinefunction(method) == (name != "typestr")


def test_the_registry_gives_each_type_its_own_handler():
  @dataclasses.dataclass
  class Leaf:
    value: int

  class Handler(type_handlers.NumpyHandler):
    pass

  arrays, leaves = type_handlers.ArrayHandler(array_metadata_store=None), Handler()
  registry = type_handlers.create_type_handler_registry((jax.Array, arrays), (Leaf, leaves))
  assert registry.get(Leaf) is leaves
  assert registry.get(type(jax.numpy.zeros(1))) is arrays


@pytest.mark.parametrize("shape, chunk", [((5, 3), (2, 3)), ((), ())])
def test_the_specifications_open_the_same_array_for_writing_and_reading(tmp_path, shape, chunk):
  context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 0}})
  info = type_handlers.ParamInfo(
    name="a.b", parent_dir=epath.Path(tmp_path), is_ocdbt_checkpoint=True, ts_context=context
  )
  asyncio.run(info.await_path_creation())
  assert (info.name, info.parent_dir) == ("a.b", epath.Path(tmp_path))
  array = np.arange(15, dtype=np.float32).reshape(5, 3) if shape else np.float32(7)
  spec = type_handlers.get_json_tspec_write(
    info,
    use_ocdbt=True,
    global_shape=shape,
    local_shape=chunk,
    dtype=np.dtype(np.float32),
    process_index=0,
    arg=ocp.SaveArgs(shard_axes=()),
  )
  store = ts.open(spec, create=True, open=True, context=context).result()
  assert store.rank == len(shape)
  assert not shape or store.chunk_layout.read_chunk.shape == chunk
  store.write(array).result()
  # Orbax merges the files of all processes when it commits a checkpoint; here those of the one process are read.
  read = type_handlers.get_json_tspec_read(info, use_ocdbt=True)
  assert all(read["kvstore"][key] == spec["kvstore"][key] for key in ("driver", "path"))
  again = ts.open({**read, "kvstore": spec["kvstore"]}, context=context).result()
  np.testing.assert_array_equal(again.read().result(), array)
