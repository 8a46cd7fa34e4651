"""Named architectures: what their parts are, and where each comes from. A name is not stored; the parts are."""

from typing import Any

_SIMPLIFIED: dict[str, Any] = dict(
  norm="rms_norm_outer",
  ffn=dict(kind="mlp", activation="relu"),
  attention=dict(projection="dense", bias="query_key", positions="learned"),
)
_SHAPED = _SIMPLIFIED["attention"] | dict(shaped="centred")
_SKIPLESS = dict(trained=True, attention_skip=0.0, ffn_gain=0.1)
_SKIPLESS_PARALLEL = dict(trained=True, parallel=True, norms="shared", ffn_skip=0.0, ffn_gain=0.1)

# Name -> fields of ModelConfig, those of its parts as dicts.
PRESETS: dict[str, dict[str, Any]] = {
  # arXiv 2410.23168
  "tokenformer": {},
  # Llama's block (arXiv 2302.13971), with as many key-value heads as heads.
  "transformer": dict(
    norm="rms_norm",
    final_norm="rms_norm",
    tied=False,
    rotary_fraction=1.0,
    attention=dict(projection="dense"),
    ffn=dict(kind="gated", activation="silu"),
  ),
  "gpt2": dict(
    norm="layer_norm",
    attention=dict(projection="dense", bias="all", positions="learned"),
    ffn=dict(kind="mlp", activation="gelu_tanh", bias=True),
  ),
  # The block of Pythia (arXiv 2304.01373).
  "gpt-neox": dict(
    norm="layer_norm",
    tied=False,
    attention=dict(projection="dense", bias="all"),
    ffn=dict(kind="mlp", activation="gelu", bias=True),
    residual=dict(parallel=True),
  ),
  # The rest is of arXiv 2311.01906: its two baselines and its simplified blocks.
  "pre-ln": _SIMPLIFIED,
  "parallel": _SIMPLIFIED | dict(residual=dict(parallel=True, norms="shared")),
  "v-skipinit": _SIMPLIFIED | dict(attention=_SHAPED | dict(values="orthogonal"), residual=_SKIPLESS),
  "v-skipinit-eq4": _SIMPLIFIED
  | dict(attention=_SHAPED | dict(shaped="skip", values="orthogonal"), residual=_SKIPLESS),
  "sas": _SIMPLIFIED | dict(attention=_SHAPED | dict(values="identity"), residual=_SKIPLESS),
  "sas-eq6": _SIMPLIFIED | dict(attention=_SHAPED | dict(values="identity_plus"), residual=_SKIPLESS),
  "sas-p": _SIMPLIFIED | dict(attention=_SHAPED | dict(values="identity"), residual=_SKIPLESS_PARALLEL),
}
PRESETS |= {
  # Switch Transformer's feed-forward (arXiv 2101.03961) in the first baseline's block.
  "switch": _SIMPLIFIED
  | dict(
    ffn=dict(kind="mlp", activation="relu", experts=8, capacity=1.25, renormalise=False, router_z=0.001),
    attention=dict(projection="dense", positions="rotary"),
    rotary_fraction=1.0,
  ),
  # arXiv 2401.04088
  "mixtral": PRESETS["transformer"] | dict(ffn=dict(kind="gated", activation="silu", experts=8, chosen=2)),
}
# TokenFormer's own mixture: its parameter tokens in groups.
PRESETS |= {"tokenformer-groups": {}}
# Presets whose feed-forward is in groups: how many there are, and how many of them a token attends to.
GROUPS = {"tokenformer-groups": (8, 2)}
_DEPTH = dict(depth=dict(capacity=0.125))
PRESETS |= {
  # arXiv 2404.02258 over Llama's block: mixture of depths, and its two unions with experts.
  "mod": PRESETS["transformer"] | _DEPTH,
  "mode-staged": PRESETS["mixtral"] | _DEPTH,
  "mode-integrated": PRESETS["mixtral"]
  | dict(ffn=dict(kind="gated", activation="silu", experts=8, no_ops=8, renormalise=False)),
}
PRESETS |= {f"{name}-no-norm": PRESETS[name] | dict(norm="none") for name in ("sas", "sas-p")}

# Encoders.
_VISION = dict(image_size=224, num_classes=1000)
PRESETS |= {
  # Crammed BERT (arXiv 2212.14034).
  "bert": dict(
    task="masked_token",
    norm="layer_norm",
    norm_epsilon=1e-12,
    embedding_norm="layer_norm",
    attention=dict(projection="dense", positions="scaled_sinusoidal"),
    ffn=dict(kind="gated"),
  ),
  # arXiv 1810.04805
  "bert-original": dict(
    task="masked_token",
    norm="layer_norm",
    final_norm="none",
    embedding_norm="layer_norm",
    norm_epsilon=1e-12,
    token_types=2,
    transform=True,
    attention=dict(projection="dense", bias="all", positions="learned"),
    ffn=dict(kind="mlp", bias=True),
    residual=dict(norms="post"),
  ),
  # arXiv 2010.11929
  "vit": dict(
    task="classify",
    norm="layer_norm",
    norm_epsilon=1e-6,
    attention=dict(projection="dense", bias="all", positions="learned"),
    ffn=dict(kind="mlp", bias=True),
    vision=_VISION | dict(pool="class_token"),
  ),
  # TokenFormer for images (arXiv 2410.23168, table 4): the norms inside of the blocks have no parameters.
  "tokenformer-vit": dict(task="classify", attention=dict(positions="learned"), vision=_VISION),
}

LANGUAGE_MODELS = tuple(name for name, fields in PRESETS.items() if "task" not in fields)

PARTS = ("attention", "ffn", "residual", "depth", "vision", "classifier")
