"""What a model is made of."""

import dataclasses
from typing import Any

from tokenformer_jax.config.sizes import NAMED_SIZES
from tokenformer_jax.config.validation import Checked, nearest, require, require_choice

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
GELUS = ("erf", "tanh")
KERNELS = ("auto", "reference", "fused")
REMAT_POLICIES = ("none", "dots", "full")
COMPUTE_DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """A TokenFormer language model (arXiv 2410.23168, section 3).

  Attributes:
    vocab_size: token ids, those that only pad the vocabulary included.
    num_layers, hidden_size, num_heads: L, d and H; each head has d / H channels.
    qkv_tokens: parameter tokens in each of query, key and value. Growth changes this and the next two numbers alone.
    proj_tokens: parameter tokens in the attention's output projection.
    ffn_tokens: parameter tokens in the feed-forward.
    seq_length: the most tokens that the model reads at once.
    theta, gelu: Θ and its GELU (`nn/theta.py`).
    rotary_fraction: the share of each head's channels that rotate.
    rotary_base: the base of the rotary frequencies.
    compute_dtype: dtype of products and activations; parameters and sums are float32 or wider.
    remat: what the backward pass recomputes instead of keeping it. `none`: norms and Θ. `dots`: everything but the
      products with parameters. `full`: a whole layer from its input.
    kernel: how pattention is computed: by the `reference`, or `fused` on TPUs (`kernels/fused_pattention.py`). `auto`
      is the fastest that was measured, which is the reference so far.
  """

  vocab_size: int
  num_layers: int
  hidden_size: int
  num_heads: int
  qkv_tokens: int
  proj_tokens: int
  ffn_tokens: int
  seq_length: int = 2048
  theta: str = "l2_norm_gelu"
  gelu: str = "erf"
  rotary_fraction: float = 0.25
  rotary_base: float = 10_000.0
  compute_dtype: str = "float32"
  remat: str = "none"
  kernel: str = "auto"

  def validate(self) -> None:
    for field in (
      "vocab_size",
      "num_layers",
      "hidden_size",
      "num_heads",
      "qkv_tokens",
      "proj_tokens",
      "ffn_tokens",
      "seq_length",
    ):
      require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1.")
    require(
      self.hidden_size % self.num_heads == 0,
      "num_heads",
      self.num_heads,
      f"must divide hidden_size={self.hidden_size}.",
    )
    require(0.0 <= self.rotary_fraction <= 1.0, "rotary_fraction", self.rotary_fraction, "must be in [0, 1].")
    require(
      self.rotary_dims % 2 == 0,
      "rotary_fraction",
      self.rotary_fraction,
      f"rotates {self.rotary_dims} of {self.head_dim} channels a head; the number must be even.",
    )
    require(self.rotary_base > 0, "rotary_base", self.rotary_base, "must be positive.")
    require_choice("theta", self.theta, THETAS)
    require_choice("gelu", self.gelu, GELUS)
    require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
    require_choice("remat", self.remat, REMAT_POLICIES)
    require_choice("kernel", self.kernel, KERNELS)
    require(
      self.kernel != "fused" or self.theta != "softmax",
      "kernel",
      self.kernel,
      f"theta={self.theta!r} has none; choose reference.",
    )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def rotary_dims(self) -> int:
    """Channels of each head that rotate: int(head_dim · rotary_fraction)."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def num_parameters(self) -> int:
    """Trained numbers: V·d + 2d + L·2d·(3·n_qkv + n_proj + n_ffn). τ is state and not counted."""
    return self.vocab_size * self.hidden_size + 2 * self.hidden_size + self.num_non_embedding_parameters

  @property
  def num_non_embedding_parameters(self) -> int:
    rows = 3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens
    return self.num_layers * 2 * self.hidden_size * rows

  @property
  def forward_flops_per_token(self) -> int:
    """Forward FLOPs a token at full context, causal attention counted at half; training is 3×."""
    rows = 3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens
    per_layer = 4 * self.hidden_size * rows + 2 * self.seq_length * self.hidden_size
    return self.num_layers * per_layer + 2 * self.vocab_size * self.hidden_size

  def grown(self, **tokens: int) -> "ModelConfig":
    """The same model with other token counts, e.g. `config.grown(ffn_tokens=8560)`."""
    changes: dict[str, Any] = dict(tokens)
    return dataclasses.replace(self, **changes)

  @classmethod
  def named(cls, name: str, **changes: Any) -> "ModelConfig":
    """A named size; `changes` replace fields, e.g. `ModelConfig.named("tiny", vocab_size=384)`."""
    if name not in NAMED_SIZES:
      raise ValueError(
        f"model size {name!r} is unknown: choose one of {', '.join(NAMED_SIZES)}." + nearest(name, NAMED_SIZES)
      )
    layers, hidden, heads, attention_tokens, ffn_tokens, seq_length = NAMED_SIZES[name]
    fields = dict(
      vocab_size=50304,
      num_layers=layers,
      hidden_size=hidden,
      num_heads=heads,
      qkv_tokens=attention_tokens,
      proj_tokens=attention_tokens,
      ffn_tokens=ffn_tokens,
      seq_length=seq_length,
    )
    unknown = set(changes) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(
        f"model field {sorted(unknown)[0]!r} is unknown."
        + nearest(sorted(unknown)[0], [f.name for f in dataclasses.fields(cls)])
      )
    return cls(**{**fields, **changes})
