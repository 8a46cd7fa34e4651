"""What a model is made of."""

import dataclasses
from typing import Any

from tokenformer_jax.config.parts import NORMS, AttentionConfig, DepthConfig, FeedForwardConfig, ResidualConfig
from tokenformer_jax.config.presets import GROUPS, PARTS, PRESETS
from tokenformer_jax.config.sizes import NAMED_SIZES
from tokenformer_jax.config.task import ClassifierConfig, VisionConfig, check_task
from tokenformer_jax.config.validation import Checked, build, nearest, require, require_choice

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
GELUS = ("erf", "tanh")
KERNELS = ("auto", "reference", "fused")
REMAT_POLICIES = ("none", "dots", "full")
COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
# The counts that growth changes, and whose rows each of them sets.
TOKEN_COUNTS = {
  "qkv_tokens": "each of query, key and value",
  "proj_tokens": "the attention's output projection",
  "ffn_tokens": "the feed-forward",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """A model: TokenFormer (arXiv 2410.23168, section 3) by default, and others by their parts (`parts.py`).

  Attributes:
    vocab_size: token ids, those that only pad the vocabulary included; 0 for images.
    num_layers, hidden_size, num_heads: L, d and H; each head has d / H channels.
    qkv_tokens: parameter tokens in each of query, key and value; 0 for dense projections. Growth changes this and the
      next two numbers alone.
    proj_tokens: parameter tokens in the attention's output projection; 0 where there is none or it is dense.
    ffn_tokens: rows of the feed-forward: parameter tokens, or hidden units.
    seq_length: the most tokens that the model reads at once; for images their number of tokens.
    theta, gelu: Θ and its GELU (`nn/theta.py`).
    norm: the norms inside the blocks: `plain`, a layer norm without parameters; `layer_norm`, with scale and bias;
      `rms_norm`, x / √(mean x² + ε) · scale; `rms_norm_outer`, x / (√mean x² + ε) · scale; or `none`, where only the
      first block's attention has a norm, a layer norm.
    final_norm: the norm before the logits.
    embedding_norm: the norm of the embedded tokens, before the first block.
    norm_epsilon: ε of all norms.
    tied: whether the logits' matrix is the embedding's, or one of its own.
    token_types: how many kinds of tokens, such as those of a pair's two sentences, have an embedding of their own, which
      is added (BERT's `token_type_ids`); 0 is none.
    transform: whether the logits of a masked token are those of LayerNorm(f(h W + b)), with the feed-forward's activation
      f, and have a bias for each entry of the vocabulary, as BERT's.
    rotary_fraction: the share of each head's channels that rotate.
    rotary_base: the base of the rotary frequencies.
    compute_dtype: dtype of products and activations; parameters and sums are float32 or wider.
    remat: what the backward pass recomputes instead of keeping it. `none`: norms and Θ. `dots`: everything but the
      products with parameters. `full`: a whole layer from its input.
    kernel: how pattention is computed: by the `reference`, or `fused` on TPUs (`kernels/fused_pattention.py`). `auto`
      is the fastest that was measured, which is the reference so far.
    task: `next_token`, a language model; `masked_token`, an encoder with logits of each token itself; `classify`, an
      encoder of images or texts with a head of classes; or `encode`, one that gives a vector of each image or text. The
      tokens of an encoder see those before and behind them.
    attention, ffn, residual: the parts of a block.
    depth: which blocks only some of the tokens go through.
    vision, classifier: the images that a model reads, and the head on one vector of a text or image.
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
  norm: str = "plain"
  final_norm: str = "layer_norm"
  embedding_norm: str = "none"
  norm_epsilon: float = 1e-5
  tied: bool = True
  token_types: int = 0
  transform: bool = False
  rotary_fraction: float = 0.25
  rotary_base: float = 10_000.0
  compute_dtype: str = "float32"
  remat: str = "none"
  kernel: str = "auto"
  task: str = "next_token"
  attention: AttentionConfig = AttentionConfig()
  ffn: FeedForwardConfig = FeedForwardConfig()
  residual: ResidualConfig = ResidualConfig()
  depth: DepthConfig = DepthConfig()
  vision: VisionConfig = VisionConfig()
  classifier: ClassifierConfig = ClassifierConfig()

  def validate(self) -> None:
    check_task(self)
    for field in ("num_layers", "hidden_size", "num_heads", "ffn_tokens", "seq_length"):
      require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1.")
    require(
      self.num_layers > 1 or not self.has_first_block,
      "num_layers",
      self.num_layers,
      f"norm={self.norm!r} or attention.values={self.attention.values!r} gives the first block parameters that the others "
      "lack, and there must be others; choose at least 2.",
    )
    self._check_attention_tokens()
    self.ffn.check_rows(self.ffn_tokens)
    self._check_depth()
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
    require(
      self.num_heads % self.num_kv_heads == 0,
      "attention.num_kv_heads",
      self.attention.num_kv_heads,
      f"must divide num_heads={self.num_heads}.",
    )
    require_choice("norm", self.norm, NORMS)
    require_choice("final_norm", self.final_norm, NORMS)
    require_choice("embedding_norm", self.embedding_norm, NORMS)
    require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "must be positive.")
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
    require(
      self.kernel != "fused" or not self.ffn.group_tokens,
      "kernel",
      self.kernel,
      f"ffn.group_tokens={self.ffn.group_tokens} has none; choose reference.",
    )
    self._check_unused()

  @property
  def is_causal(self) -> bool:
    """Whether a token sees only itself and those before it."""
    return self.task == "next_token"

  @property
  def reads_images(self) -> bool:
    return self.vision.image_size > 0

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def rotary_dims(self) -> int:
    """Channels of each head that rotate: int(head_dim · rotary_fraction)."""
    return int(self.head_dim * self.rotary_fraction) if self.attention.positions == "rotary" else 0

  @property
  def num_kv_heads(self) -> int:
    """Heads of keys and values."""
    return self.attention.num_kv_heads or self.num_heads

  @property
  def num_parameters(self) -> int:
    """Trained numbers. τ is state and not counted."""
    return _counts().num_parameters(self)

  @property
  def num_non_embedding_parameters(self) -> int:
    """Trained numbers in the matrices and parameter tokens of the blocks."""
    return _counts().num_non_embedding_parameters(self)

  @property
  def forward_flops_per_token(self) -> int:
    """Forward FLOPs in products for a token at full context, causal attention counted at half; training is 3×."""
    return _counts().forward_flops_per_token(self)

  @property
  def has_first_block(self) -> bool:
    """Whether the first block has parameters that the others lack, and so stands before the scanned ones."""
    return self.norm == "none" or self.attention.values == "identity"

  @property
  def pattern(self) -> tuple[bool, ...]:
    """Whether each block is routed, of those that repeat; the first block is none of them where it differs."""
    if self.depth.capacity == 1.0:
      return (False,)
    return (False,) * (self.depth.every - 1) + (True,)

  def is_routed(self, layer: int) -> bool:
    """Whether only some of the tokens go through a layer."""
    return layer >= self.has_first_block and self.pattern[(layer - self.has_first_block) % len(self.pattern)]

  def _check_depth(self) -> None:
    """Checks that the blocks are whole repetitions of the pattern."""
    first, length = int(self.has_first_block), len(self.pattern)
    below = max(1, (self.num_layers - first) // length) * length + first
    near = f"{below}" if self.num_layers < below else f"{below} or {below + length}"
    blocks = f"blocks repeat in {length}s" + (" behind a first one" if first else "")
    why = f"depth.every={self.depth.every}: {blocks}; choose {near}."
    require((self.num_layers - first) % length == 0, "num_layers", self.num_layers, why)

  def _check_attention_tokens(self) -> None:
    """Checks that there are parameter tokens exactly where a projection is made of them."""
    tokens = self.attention.projection == "pattention"
    has_proj = tokens and self.attention.values != "identity"
    why = f"attention.projection={self.attention.projection!r}, attention.values={self.attention.values!r}"
    for field, needed in (("qkv_tokens", tokens), ("proj_tokens", has_proj)):
      value = getattr(self, field)
      if needed:
        require(value >= 1, field, value, "must be at least 1.")
      else:
        require(value == 0, field, value, f"{why}: there are no such tokens; choose 0.")

  def _check_unused(self) -> None:
    """Checks that fields without a meaning for these parts are at their defaults."""
    unused = []
    if self.attention.positions != "rotary":
      way_out = f"attention.positions={self.attention.positions!r}: nothing rotates"
      unused += [("rotary_fraction", way_out), ("rotary_base", way_out)]
    if self.attention.projection != "pattention" and self.ffn.kind != "pattention":
      way_out = (
        f"attention.projection={self.attention.projection!r}, ffn.kind={self.ffn.kind!r}: there are no parameter tokens"
      )
      unused += [("theta", way_out), ("gelu", way_out), ("kernel", way_out)]
    for field, why in unused:
      value, default = getattr(self, field), getattr(ModelConfig, field)
      require(value == default, field, value, f"{why}; leave it at {default!r}.")

  def grown(self, **tokens: int) -> "ModelConfig":
    """The same model with other token counts, e.g. `config.grown(ffn_tokens=8560)`."""
    changes: dict[str, Any] = dict(tokens)
    return dataclasses.replace(self, **changes)

  @classmethod
  def from_dict(cls, fields: Any, path: str = "model") -> "ModelConfig":
    """The configuration from nested dicts, as checkpoints and weight files have it; parts that it lacks are TokenFormer's.

    Raises:
      ValueError: an unknown field or a value that is refused, by its path below `path`.
    """
    return build(cls, fields, path)

  @classmethod
  def named(cls, name: str, preset: str = "tokenformer", projection: str = "", **changes: Any) -> "ModelConfig":
    """A named size of a named architecture.

        ModelConfig.named("tiny", vocab_size=384)
        ModelConfig.named("small", "sas-p", projection="pattention")

    Every preset has about as many parameters in its feed-forwards as TokenFormer of that size: a gated one gets two
    thirds of the rows, for it has three matrices. Of experts, those that a token goes through have as many together, and
    so have the groups of parameter tokens that it attends to; `presets.GROUPS` has the numbers of groups.

    Args:
      name: one of `NAMED_SIZES`.
      preset: one of `PRESETS`.
      projection: `pattention` or `dense`, for attention and feed-forward; by default the preset's.
      changes: fields that replace those of size and preset; of a part, a dict of some of its fields.

    Raises:
      ValueError: an unknown size, preset or field, or values that contradict each other.
    """
    for kind, value, known in (("size", name, NAMED_SIZES), ("preset", preset, PRESETS)):
      if value not in known:
        raise ValueError(
          f"model {kind} {value!r} is unknown: choose one of {', '.join(known)}." + nearest(value, known)
        )
    known_fields = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(changes) - set(known_fields)):
      raise ValueError(f"model field {unknown[0]!r} is unknown." + nearest(unknown[0], known_fields))
    fields = {**PRESETS[preset], **changes}
    for part in PARTS:
      given = changes.get(part, {})
      whole = dataclasses.is_dataclass(given) and not isinstance(given, type)
      fields[part] = dataclasses.asdict(given) if whole else {**PRESETS[preset].get(part, {}), **given}
    if projection:
      fields["attention"] |= dict(projection=projection)
      if projection == "pattention":
        fields["attention"] |= dict(bias="none")
        mixture = {k: v for k, v in fields["ffn"].items() if k not in ("activation", "bias")}
        fields["ffn"] = mixture | dict(kind="pattention")
      elif fields["ffn"].get("kind", "pattention") == "pattention":
        fields["ffn"] |= dict(kind="mlp")
    layers, hidden, heads, attention_tokens, ffn_tokens, seq_length = NAMED_SIZES[name]
    if preset in GROUPS:
      groups, chosen = GROUPS[preset]
      rows = fields.setdefault("ffn_tokens", ffn_tokens * groups // chosen)
      fields["ffn"] = dict(group_tokens=max(rows // groups, 1), chosen=chosen) | fields["ffn"]
    for part in PARTS:
      fields[part] = build(_PART_CLASSES[part], fields[part], f"model.{part}")
    is_dense, has_proj = fields["attention"].projection == "dense", fields["attention"].values != "identity"
    size = dict(
      vocab_size=50304,
      num_layers=layers,
      hidden_size=hidden,
      num_heads=heads,
      qkv_tokens=0 if is_dense else attention_tokens,
      proj_tokens=0 if is_dense or not has_proj else attention_tokens,
      ffn_tokens=(ffn_tokens * 2 // 3 if fields["ffn"].kind == "gated" else ffn_tokens)
      // (fields["ffn"].chosen if fields["ffn"].experts > 1 else 1),
      seq_length=seq_length,
    )
    if fields["vision"].image_size > 0:
      size |= dict(vocab_size=0, seq_length=fields["vision"].num_tokens)
    return cls(**{**size, **fields})


def _counts() -> Any:
  # The counts are read from what the model's parameters declare. Configurations themselves need no jax.
  from tokenformer_jax.models import counts

  return counts


_PART_CLASSES = {f.name: f.type for f in dataclasses.fields(ModelConfig) if f.name in PARTS}
