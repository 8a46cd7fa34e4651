"""The independent parts of a block. Every field has a neutral default, and together the defaults are TokenFormer's block.

A field that its kind does not use must be at its default, so that one model has one description.
"""

import dataclasses

from tokenformer_jax.config.validation import Checked, require, require_choice

PROJECTIONS = ("pattention", "dense")
VALUES = ("projected", "orthogonal", "identity", "identity_plus")
SHAPES = ("none", "skip", "centred")
POSITIONS = ("rotary", "learned", "sinusoidal", "scaled_sinusoidal")
BIASES = ("none", "query_key", "all")
FEED_FORWARDS = ("pattention", "mlp", "gated")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORM_PLACES = ("pre", "shared", "post")
DEPTH_CHOICES = ("expert", "token", "random")
DEPTH_GATES = ("linear", "sigmoid")
CAUSAL_RULES = ("predictor", "auxiliary")
NORMS = ("plain", "layer_norm", "rms_norm", "rms_norm_outer", "none")


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Checked):
  """Attention between input tokens.

  Attributes:
    projection: what makes queries, keys, values and the output: `pattention`, or a `dense` matrix each.
    num_kv_heads: heads of keys and values, each read by the same number of query heads; 0 means as many as queries.
    bias: which dense projections have a bias: `none`, `query_key` or `all`.
    values: `projected`; `orthogonal`, where value and output matrices begin as random orthogonal ones; `identity`, where
      there are none but for the first layer's value, α x + β x W with W = 0 at first (SAS); or `identity_plus`, where
      value and output are of that form in every layer (arXiv 2311.01906, eq. 6).
    shaped: the attention matrix: `none`, the softmax A; `skip`, α I + β A with β = 0 at first (V-SkipInit, eq. 4);
      `centred`, α I + β A − γ C, where C is A for scores of zero (eq. 5). Queries then begin at 0, so that attention
      is the identity in a new model. α, β and γ are trained, one for each head.
    positions: `rotary`, or an embedding added to the tokens': `learned`, `sinusoidal`, or `scaled_sinusoidal`, whose
      factor is trained and begins at 1 / √d.
  """

  projection: str = "pattention"
  num_kv_heads: int = 0
  bias: str = "none"
  values: str = "projected"
  shaped: str = "none"
  positions: str = "rotary"

  def validate(self) -> None:
    require_choice("projection", self.projection, PROJECTIONS)
    require_choice("bias", self.bias, BIASES)
    require_choice("values", self.values, VALUES)
    require_choice("shaped", self.shaped, SHAPES)
    require_choice("positions", self.positions, POSITIONS)
    require(self.num_kv_heads >= 0, "num_kv_heads", self.num_kv_heads, "must not be negative; 0 is as many as heads.")
    if self.projection == "pattention":
      require(self.bias == "none", "bias", self.bias, "pattention has no bias; choose 'none' or projection='dense'.")
      require(
        self.values != "orthogonal",
        "values",
        self.values,
        "parameter tokens have no orthogonal start; choose another or projection='dense'.",
      )
    if self.values.startswith("identity"):
      require(self.bias != "all", "bias", self.bias, f"values={self.values!r} have none; choose 'query_key' or 'none'.")
      require(
        self.num_kv_heads == 0,
        "num_kv_heads",
        self.num_kv_heads,
        f"values={self.values!r} are the inputs themselves, one for each head; choose 0.",
      )


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig(Checked):
  """The feed-forward. Its rows, `ModelConfig.ffn_tokens`, are parameter tokens or hidden units.

  Attributes:
    kind: `pattention`; `mlp`, activation(x Kᵀ) V; or `gated`, (activation(x Gᵀ) · x Kᵀ) V.
    activation: of `mlp` and `gated`: `gelu` (exact), `gelu_tanh`, `relu` or `silu`.
    bias: whether the products of `mlp` and `gated` have biases.
    experts: the number of such networks, each with all of the rows; 1 is a plain feed-forward (`nn/experts.py`).
    no_ops: further entries of the router, which give 0.
    chosen: how many entries, or groups, each token goes through.
    group_tokens: the number of parameter tokens in a group, of `kind='pattention'`: `ffn_tokens` are then in groups that
      follow one another, and each token attends to `chosen` of them (`nn/token_groups.py`); 0 is no groups.
    capacity: the most tokens of a sequence that an expert takes in training, in units of the tokens that it would get
      if all entries got as many; 0 is no limit. Evaluation and decoding have none.
    renormalise: whether the chosen ones' weights are divided by their sum.
    balance: coefficient of the loss that evens out how many tokens the experts or groups get.
    router_z: coefficient of the router's z-loss.
  """

  kind: str = "pattention"
  activation: str = "gelu"
  bias: bool = False
  experts: int = 1
  no_ops: int = 0
  chosen: int = 1
  capacity: float = 0.0
  renormalise: bool = True
  balance: float = 0.01
  router_z: float = 0.0
  group_tokens: int = 0

  @property
  def has_router(self) -> bool:
    """Whether a router chooses among experts or groups of parameter tokens."""
    return self.experts > 1 or self.group_tokens > 0

  @property
  def active(self) -> float:
    """The share of tokens that go through each expert, if all entries of the router get as many."""
    return self.chosen / (self.experts + self.no_ops) if self.experts > 1 else 1.0

  def validate(self) -> None:
    require_choice("kind", self.kind, FEED_FORWARDS)
    require_choice("activation", self.activation, ACTIVATIONS)
    self._check_experts()
    if self.kind == "pattention":
      way_out = "kind='pattention' has Θ and no bias; leave it, or choose kind='mlp'."
      require(self.activation == "gelu", "activation", self.activation, way_out)
      require(not self.bias, "bias", self.bias, way_out)

  def _check_experts(self) -> None:
    for field, least in (
      ("experts", 1),
      ("chosen", 1),
      ("no_ops", 0),
      ("capacity", 0),
      ("balance", 0),
      ("router_z", 0),
      ("group_tokens", 0),
    ):
      require(getattr(self, field) >= least, field, getattr(self, field), f"must be at least {least}.")
    if self.group_tokens:
      way_out = f"group_tokens={self.group_tokens}: groups are of parameter tokens; choose 'pattention'."
      require(self.kind == "pattention", "kind", self.kind, way_out)
      self._check_defaults(("experts", "no_ops", "capacity", "renormalise"), f"group_tokens={self.group_tokens}")
      return
    if self.experts == 1:
      unused = ("no_ops", "chosen", "capacity", "renormalise", "balance", "router_z")
      self._check_defaults(unused, "experts=1 has no router", ", or choose more experts")
      return
    entries = self.experts + self.no_ops
    shown = f"experts={self.experts}" + (f" and no_ops={self.no_ops}" if self.no_ops else "")
    require(self.chosen <= entries, "chosen", self.chosen, f"there are only {shown}; choose at most {entries}.")
    require(not self.bias, "bias", self.bias, f"{shown} have no biases; choose False, or experts=1.")
    require(
      not (self.renormalise and self.chosen == 1),
      "renormalise",
      self.renormalise,
      "with chosen=1 every weight would be 1 and the router would not learn; choose False, or chosen=2.",
    )

  def check_rows(self, rows: int) -> None:
    """Raises ValueError unless `ffn_tokens` are whole groups, and at least as many as each token attends to."""
    if not (size := self.group_tokens):
      return
    below = max(1, rows // size) * size
    near = f"{below}" if rows < below else f"{below} or {below + size}"
    require(rows % size == 0, "ffn_tokens", rows, f"ffn.group_tokens={size}: these are no whole groups; choose {near}.")
    groups = rows // size
    why = f"ffn_tokens={rows} are {groups} groups of ffn.group_tokens={size}; choose at most {groups}."
    require(self.chosen <= groups, "ffn.chosen", self.chosen, why)

  def _check_defaults(self, fields: tuple[str, ...], why: str, instead: str = "") -> None:
    for field in fields:
      default = type(self).__dataclass_fields__[field].default
      require(getattr(self, field) == default, field, getattr(self, field), f"{why}; leave {default!r}{instead}.")


@dataclasses.dataclass(frozen=True)
class ResidualConfig(Checked):
  """How attention and feed-forward are added up (arXiv 2311.01906, eq. 1 and 7). N is the norm before each of them.

      sequential   U = a X + b Attention(N X),    Y = c U + d FeedForward(N' U)
      parallel     Y = c X + b Attention(N X) + d FeedForward(N' X)

  Attributes:
    parallel: whether the feed-forward reads the block's input instead of U.
    norms: `pre`, a norm before each; `shared`, one norm for both, of a parallel block; `post`, a norm after each sum
      and none before, of a sequential block.
    trained: whether the gains below are trained, one number each, without decay. One that is 0 is an absent term.
    attention_skip, attention_gain, ffn_skip, ffn_gain: a, b, c and d.
  """

  parallel: bool = False
  norms: str = "pre"
  trained: bool = False
  attention_skip: float = 1.0
  attention_gain: float = 1.0
  ffn_skip: float = 1.0
  ffn_gain: float = 1.0

  def validate(self) -> None:
    require_choice("norms", self.norms, NORM_PLACES)
    if self.parallel:
      require(self.norms != "post", "norms", self.norms, "a parallel block has 'pre' or 'shared' norms.")
      require(
        self.attention_skip == 1.0,
        "attention_skip",
        self.attention_skip,
        "a parallel block has ffn_skip alone; leave 1.",
      )
    else:
      require(self.norms != "shared", "norms", self.norms, "needs parallel=True; choose 'pre' or 'post'.")
    for field in ("attention_gain", "ffn_gain"):
      require(getattr(self, field) != 0.0, field, getattr(self, field), "must not be 0: the layer would be absent.")


@dataclasses.dataclass(frozen=True)
class DepthConfig(Checked):
  """Mixture of depths (arXiv 2404.02258): blocks that only some of the tokens go through (`nn/depth_routing.py`).

  Attributes:
    capacity: the share of a sequence's tokens that go through a routed block in training; 1 is no routing.
    every: the last of this many blocks that follow one another is routed; 1 is all.
    choice: `expert`, the tokens with the highest scores of the sequence; `token`, those that prefer the block, up to
      the capacity; `random`, a control.
    gate: what scales a block's update: the score itself (`linear`) or its `sigmoid`.
    causal: what decides outside of training, for `choice='expert'`: a `predictor`, which trains beside the model and
      does not change it, or the sign of the score, which an `auxiliary` loss teaches.
    weight: coefficient of the loss of the predictor, of the auxiliary loss, or of the balance of `choice='token'`.
  """

  capacity: float = 1.0
  every: int = 2
  choice: str = "expert"
  gate: str = "linear"
  causal: str = "predictor"
  weight: float = 0.01

  @property
  def is_routed(self) -> bool:
    """Whether there are routed blocks; training then routes by another rule than everything else."""
    return self.capacity < 1.0

  def validate(self) -> None:
    require(0.0 < self.capacity <= 1.0, "capacity", self.capacity, "must be in (0, 1]; 1 is no routing.")
    require(self.every >= 1, "every", self.every, "must be at least 1.")
    require(self.weight >= 0.0, "weight", self.weight, "must not be negative.")
    require_choice("choice", self.choice, DEPTH_CHOICES)
    require_choice("gate", self.gate, DEPTH_GATES)
    require_choice("causal", self.causal, CAUSAL_RULES)
    if self.capacity == 1.0:
      for field in ("every", "choice", "gate", "causal", "weight"):
        default = type(self).__dataclass_fields__[field].default
        way_out = f"capacity=1.0 routes nothing; leave {default!r}, or choose a smaller capacity."
        require(getattr(self, field) == default, field, getattr(self, field), way_out)
    if self.choice != "expert":
      why = f"choice={self.choice!r} needs no other rule outside of training; leave 'predictor'."
      require(self.causal == "predictor", "causal", self.causal, why)
    if self.choice == "token":
      require(self.gate == "sigmoid", "gate", self.gate, "choice='token' scales by a probability; choose 'sigmoid'.")
