"""Matrix products of rows with one of several matrices, each row with that of its group.

`jax.lax.ragged_dot` computes them on TPUs. Elsewhere XLA lowers it to products with all matrices, so the rows are sorted
into blocks instead, whose rows share a matrix, and a scan multiplies block after block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import platform
from tokenformer_jax.kernels.products import sum_dtype

# A block has at most this many rows, and at most this share of the rows that a group has on average: the rows that only
# fill blocks then stay below that share of all rows.
_LARGEST_BLOCK, _PADDING = 256, 0.25


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=["block"],
  data_fields=["source", "destination", "sizes", "group_of_block"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
  """Where each of R rows lies among P sorted ones, of which some may be empty.

  Attributes:
    source: the row that lies at each sorted place, [P]; R where there is none.
    destination: the sorted place of each row, [R]; P for a row of no group.
    sizes: the number of rows in each group, [G].
    group_of_block: the group of each block of sorted rows; G for a block without rows. Without blocks it is empty.
    block: the number of rows in a block; 0 where the groups follow one another without padding.
  """

  source: Int[Array, "place"]
  destination: Int[Array, "row"]
  sizes: Int[Array, "group"]
  group_of_block: Int[Array, "block"]
  block: int

  def sort(self, x: Float[Array, "row d"]) -> Float[Array, "place d"]:
    """The rows at their sorted places, with zeros at empty ones."""
    return _moved(x, self.source, self.destination)

  def unsort(self, y: Float[Array, "place d"]) -> Float[Array, "row d"]:
    """The rows in their order, with zeros for a row of no group."""
    return _moved(y, self.destination, self.source)


def make_groups(group: Int[Array, "row"], num_groups: int, padded: bool | None = None) -> Groups:
  """Sorts rows by their groups.

  Args:
    group: the group of each row, [R]; `num_groups` for one that is in no group and is left out.
    num_groups: G.
    padded: whether the groups are padded to blocks; by default they are, but on a TPU.
  """
  num_rows = len(group)
  order = jnp.argsort(group, stable=True)
  sizes = jnp.bincount(group, length=num_groups + 1)[:num_groups]
  if padded is None:
    padded = platform() != "tpu"
  if not padded:
    place = jnp.zeros_like(group).at[order].set(jnp.arange(num_rows, dtype=group.dtype))
    left_out = group == num_groups
    return Groups(
      jnp.where(left_out[order], num_rows, order), jnp.where(left_out, num_rows, place), sizes, jnp.zeros(0, int), 0
    )
  block = _block_size(num_rows, num_groups)
  # Each group wastes less than a block.
  num_blocks = num_rows if block == 1 else num_rows // block + min(num_groups, num_rows)
  blocks = -(-sizes // block)
  first_row, first_block = jnp.cumsum(sizes) - sizes, jnp.cumsum(blocks) - blocks
  # The place of the i-th sorted row: its group's first block, and its rank inside of the group.
  in_order = group[order]
  start = jnp.append(first_block * block - first_row, 0)
  place_in_order = jnp.where(in_order == num_groups, num_blocks * block, jnp.arange(num_rows) + start[in_order])
  source = jnp.full(num_blocks * block, num_rows).at[place_in_order].set(order, mode="drop")
  destination = jnp.zeros(num_rows, place_in_order.dtype).at[order].set(place_in_order)
  group_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
  return Groups(source, destination, sizes, group_of_block, block)


def grouped_row_products(
  x: Float[Array, "place d"], tables: Float[Array, "group n d"], groups: Groups
) -> Float[Array, "place n"]:
  """x · tableᵀ of each row with its group's table, in the `sum_dtype` of x; empty places give zeros."""
  return _grouped("md,nd->mn", x, tables, groups)


def grouped_weighted_sums(
  weights: Float[Array, "place n"], tables: Float[Array, "group n e"], groups: Groups
) -> Float[Array, "place e"]:
  """weights · table of each row with its group's table, in the `sum_dtype` of the weights."""
  return _grouped("mn,ne->me", weights, tables, groups)


def _block_size(num_rows: int, num_groups: int) -> int:
  size = min(int(_PADDING * num_rows / num_groups), _LARGEST_BLOCK)
  return size // 8 * 8 if size >= 8 else max(size, 1)


def _grouped(equation, x, tables, groups):
  if groups.block:
    return _blockwise(equation, x, tables, groups.group_of_block)
  tables = tables.swapaxes(1, 2) if equation == "md,nd->mn" else tables
  return jax.lax.ragged_dot(x, tables, groups.sizes, preferred_element_type=sum_dtype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(equation, x, tables, group_of_block):
  """`equation` of each block of rows with its group's table; blocks of no group are skipped and give zeros."""
  blocks, wide = x.reshape(len(group_of_block), -1, x.shape[1]), sum_dtype(x.dtype)

  def product(_, block_and_group):
    block, group = block_and_group

    def multiply():
      return jnp.einsum(equation, block, tables[group], preferred_element_type=wide)

    zeros = jnp.zeros(jax.eval_shape(multiply).shape, wide)
    return None, jax.lax.cond(group < len(tables), multiply, lambda: zeros)

  y = jax.lax.scan(product, None, (blocks, group_of_block))[1]
  return y.reshape(len(x), -1)


def _blockwise_forward(equation, x, tables, group_of_block):
  return _blockwise(equation, x, tables, group_of_block), (x, tables, group_of_block)


def _blockwise_backward(equation, saved, d_y):
  # The chain rule alone would add an array of the size of all tables for every block.
  x, tables, group_of_block = saved
  d_y = d_y.astype(x.dtype)
  operands, of_y = equation.split("->")
  of_x, of_table = operands.split(",")
  d_x = _blockwise(f"{of_y},{of_table}->{of_x}", d_y, tables, group_of_block).astype(x.dtype)
  wide = sum_dtype(x.dtype)
  blocks = [a.reshape(len(group_of_block), -1, a.shape[1]) for a in (d_y, x)]

  def add(d_tables, inputs):
    d_y, x, group = inputs

    def multiply(d_tables):
      return d_tables.at[group].add(jnp.einsum(f"{of_y},{of_x}->{of_table}", d_y, x, preferred_element_type=wide))

    return jax.lax.cond(group < len(tables), multiply, lambda d_tables: d_tables, d_tables), None

  d_tables, _ = jax.lax.scan(add, jnp.zeros(tables.shape, wide), (*blocks, group_of_block))
  return d_x, d_tables.astype(tables.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


@jax.custom_vjp
def _moved(x, there, back):
  """x[there], with zeros where the index is past the end. `back` is the inverse, so that the gradient is a gather too."""
  return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
  lambda x, there, back: (_moved(x, there, back), (there, back)),
  lambda indices, d_y: (_moved(d_y, indices[1], indices[0]), None, None),
)
