"""Parameter tokens in int8, for models that only write and are measured."""

from flax import nnx

from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import Pattention


def int8_tokens(model: LanguageModel) -> LanguageModel:
  """A copy of `model` with keys and values in int8: half of bfloat16's bytes, which is what decoding waits for.

  Rounded to the nearest of 255 levels, each key on a scale of its own and each output channel of the values: the
  scales then multiply scores and outputs, and products stay products. Embedding, norms and τ stay. The `reference`
  kernel takes them. It cannot be trained, and is not saved; what it costs is in experiments/benchmarks/README.md.

  Raises:
    ValueError: qwix is not installed, or the tokens are int8 already.
  """
  try:
    import qwix  # Here, for nothing else needs it.
  except ModuleNotFoundError:
    raise ValueError("int8 needs qwix: pip install 'tokenformer_jax[int8]'.") from None

  def rounded(param, whole):
    """(int8, float32 scales) with one scale for what lies along axis `whole`; of each layer for itself."""
    kept = tuple(axis for axis in range(param.ndim) if axis != param.ndim + whole)
    q = qwix.quantize(param[...], "int8", channelwise_axes=kept)
    layer = param.axes[:-2]
    return nnx.Param(q.qvalue, axes=param.axes), nnx.Param(q.scale.squeeze(whole), axes=(*layer, None))

  model = nnx.merge(*split(model))
  for _, layer in nnx.iter_modules(model):
    if isinstance(layer, Pattention):
      if layer.key_scales is not None:
        raise ValueError("the model's parameter tokens are int8 already; take it as it is.")
      layer.keys, layer.key_scales = rounded(layer.keys, whole=-1)
      layer.values, layer.value_scales = rounded(layer.values, whole=-2)
      layer.kernel = "reference"
  return model
