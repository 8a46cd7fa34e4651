"""What a block reads beside the residual stream: where its tokens stand, and which of them may see each other."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Bool, Int

from tokenformer_jax.nn.remat import keep_scores
from tokenformer_jax.nn.rotary import Rotation


@dataclasses.dataclass(frozen=True)
class Context:
  """The tokens of one forward pass. Training and prefill attend among the tokens themselves, decoding to a cache.

  Attributes:
    positions: the position of each token in its document, [B, T] or [1, T].
    rotation: rotary tables of these positions; None for a model that adds its positions to the embedding.
    segments: document of each token; attention stays inside a document. None is one document.
    real: which tokens are not padding; None is all of them.
    visible: which slots of the cache each token may see, [B, 1, T, S]; None where tokens attend among themselves.
    filled: the number of slots that the cache had filled before these tokens; None without a cache.
    remat: wraps each norm with the projections that read it. The identity disables rematerialisation, so that values
      from inside can be observed, as growth's measure of usage does.
  """

  positions: Int[Array, "batch time"]
  rotation: Rotation | None = None
  segments: Int[Array, "batch time"] | None = None
  real: Bool[Array, "batch time"] | None = None
  visible: Bool[Array, "batch 1 time slot"] | None = None
  filled: Int[Array, ""] | None = None
  remat: Callable[[Callable], Callable] = keep_scores

  def observed(self) -> "Context":
    """The same context without rematerialisation."""
    return dataclasses.replace(self, remat=lambda function: function)
