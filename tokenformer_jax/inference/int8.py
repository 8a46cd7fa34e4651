"""Parameter tokens in int8, for models that are only evaluated and generate text."""

import jax
from flax import nnx

from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import Pattention, require_float_tokens


def int8_tokens(model: LanguageModel) -> LanguageModel:
  """A copy of `model` with keys and values in int8: half of bfloat16's bytes, which is what limits decoding.

  Numbers are rounded to the nearest of 255 levels. Each key has a scale, and so has each output channel of the values;
  the scales then multiply scores and outputs, so that both products stay matrix products. Embedding, norms and τ stay
  as they are. The copy uses the `reference` kernel. It cannot be trained, grown, exported or saved.
  experiments/benchmarks/README.md measures what the rounding costs.

  Args:
    model: a language model with float tokens, which stays as it is.

  Raises:
    ValueError: qwix is not installed, the model has no parameter tokens or they are int8 already, or it is a copy for
      decoding.
  """
  try:
    import qwix  # Imported only here, because nothing else needs it.
  except ModuleNotFoundError:
    raise ValueError("int8 needs qwix: pip install 'tokenformer_jax[int8]'.") from None
  require_float_tokens(model, "rounded to int8")

  def rounded(param, shared):
    """(int8, float32 scales), where the numbers along axis `shared` share a scale; each layer has its own scales."""
    kept = tuple(axis for axis in range(param.ndim) if axis != param.ndim + shared)
    quantised = jax.jit(lambda a: qwix.quantize(a, "int8", channelwise_axes=kept))(param[...])
    scales = nnx.Param(quantised.scale.squeeze(shared), axes=(*param.axes[:-2], None))
    return nnx.Param(quantised.qvalue, axes=param.axes), scales

  model = nnx.merge(*split(model))
  layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, Pattention)]
  if not layers:
    raise ValueError("int8 rounds parameter tokens, and this model has none: its matrices are dense; use bfloat16.")
  for layer in layers:
    layer.keys, layer.key_scales = rounded(layer.keys, shared=-1)
    layer.values, layer.value_scales = rounded(layer.values, shared=-2)
    layer.kernel = "reference"
  return model
