"""The train step of this package in turns with those of plain PyTorch models, on one GPU.

The PyTorch side is written as its users write it: bfloat16 autocast over float32 parameters, `scaled_dot_product_attention`
(flash attention), `torch.compile` of a layer and of the loss, the fused AdamW and `clip_grad_norm_`. `pattention` is the
same model as ours. `dense` is GPT-NeoX's layer with matrices in the place of parameter tokens, which has 3/4 of the
FLOPs in its products.
"""

import math
import statistics
import time

import jax

from experiments.benchmarks.accelerator.train import Running, compiled_step
from tokenformer_jax.config import Config, ModelConfig

# Named size, positions and rows, most important first.
_CASES = [("450m", 2048, 8), ("150m", 2048, 16)]
_TINY_CASES = [("tiny", 64, 2)]
_ROUNDS = 5


class Torch:
  """A model and its optimizer; `run` has the form of `train.Running.run`."""

  def __init__(self, model: ModelConfig, rows: int, layer: str, compiled: bool):
    import torch

    self._torch = torch
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    d, n, m = model.hidden_size, model.qkv_tokens, model.ffn_tokens

    def matrix(*shape):
      drawn = torch.empty(shape).normal_(std=0.02, generator=generator)
      return drawn.to(self._device).requires_grad_()

    if layer == "dense":
      shapes = {"qkv": (3 * d, d), "proj": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    else:
      pairs = {"query": n, "key": n, "value": n, "proj": model.proj_tokens, "ffn": m}
      shapes = {f"{name}.{side}": (rows_, d) for name, rows_ in pairs.items() for side in ("keys", "values")}
    self._layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(model.num_layers)]
    self._embedding = matrix(model.vocab_size, d)
    norm = [torch.ones(d, device=self._device), torch.zeros(d, device=self._device)]
    self._norm = [weight.requires_grad_() for weight in norm]
    weights = [self._embedding, *(weight for layer_ in self._layers for weight in layer_.values())]
    self._all = [*weights, *self._norm]
    settings = Config(model=model).optimizer
    self._optimizer = torch.optim.AdamW(
      [dict(params=weights, weight_decay=settings.weight_decay), dict(params=self._norm, weight_decay=0.0)],
      lr=1e-5,
      betas=(settings.beta1, settings.beta2),
      eps=settings.eps,
      fused=True,
    )
    self._clip_norm = settings.clip_norm
    ids = torch.randint(0, model.vocab_size, (rows, model.seq_length + 1), generator=generator).to(self._device)
    self._inputs, self._labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    wrap = (lambda function: torch.compile(function, dynamic=False)) if compiled else lambda function: function
    self._layer, self._loss = wrap(_layer(model, layer, self._device)), wrap(_loss)

  def run(self, steps: int = 1) -> tuple[float, float]:
    """Returns (seconds a step, loss of the last step)."""
    torch = self._torch
    self._wait()
    begin = time.perf_counter()
    for _ in range(steps):
      with torch.autocast(self._device, dtype=torch.bfloat16):
        x = self._embedding[self._inputs].to(torch.bfloat16)
        for weights in self._layers:
          x = self._layer(x, weights)
        loss = self._loss(x, self._norm[0], self._norm[1], self._embedding, self._labels)
      self._optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self._all, self._clip_norm)
      self._optimizer.step()
    self._wait()
    return (time.perf_counter() - begin) / steps, float(loss.detach())

  def peak(self) -> int:
    return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else 0

  def close(self):
    self._layers, self._all, self._optimizer, self._embedding = [], [], None, None
    if self._device == "cuda":
      self._torch.cuda.empty_cache()
      self._torch.cuda.reset_peak_memory_stats()

  def _wait(self):
    if self._device == "cuda":
      self._torch.cuda.synchronize()


def _layer(model: ModelConfig, kind: str, device: str):
  """Returns `(x [B, T, d], weights of a layer) -> x`."""
  import torch
  from torch.nn import functional

  half, width, heads = model.rotary_dims // 2, (model.hidden_size,), model.num_heads
  angles = torch.arange(model.seq_length)[:, None] * model.rotary_base ** (-torch.arange(half) / half)
  cos, sin = torch.cos(angles).to(device), torch.sin(angles).to(device)

  def rotate(x):
    first, second, rest = x.split([half, half, model.head_dim - 2 * half], dim=-1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], dim=-1)

  def pattention(x, weights, name):
    scores = functional.linear(x, weights[f"{name}.keys"]).float()
    unit = scores / scores.norm(dim=-1, keepdim=True)
    return functional.gelu(unit * math.sqrt(scores.shape[-1])) @ weights[f"{name}.values"]

  def attend(q, k, v):
    batch, time_ = q.shape[:2]
    q, k, v = (a.view(batch, time_, heads, -1).transpose(1, 2) for a in (q, k, v))
    y = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return y.transpose(1, 2).reshape(batch, time_, -1)

  def of_tokens(x, weights):
    normed = functional.layer_norm(x, width).to(torch.bfloat16)
    y = attend(*(pattention(normed, weights, name) for name in ("query", "key", "value")))
    x = x + pattention(y, weights, "proj")
    return x + pattention(functional.layer_norm(x, width).to(torch.bfloat16), weights, "ffn")

  def dense(x, weights):
    normed = functional.layer_norm(x, width).to(torch.bfloat16)
    y = attend(*functional.linear(normed, weights["qkv"]).chunk(3, dim=-1))
    x = x + functional.linear(y, weights["proj"])
    hidden = functional.gelu(functional.linear(functional.layer_norm(x, width).to(torch.bfloat16), weights["up"]))
    return x + functional.linear(hidden, weights["down"])

  return dense if kind == "dense" else of_tokens


def _loss(x, scale, bias, embedding, labels):
  from torch.nn import functional

  x = functional.layer_norm(x, (x.shape[-1],), scale, bias)
  logits = functional.linear(x, embedding)
  return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def run(results, clock, tiny):
  try:
    import torch
  except ImportError:
    results.add("torch", "Train steps in turns", note="skipped: PyTorch is not installed")
    return
  torch.set_float32_matmul_precision("high")
  if jax.default_backend() != ("gpu" if torch.cuda.is_available() else "cpu"):
    results.add("torch", "Train steps in turns", note="skipped: PyTorch does not see the devices that JAX sees")
    return
  for name, length, rows in _TINY_CASES if tiny else _CASES:
    if clock.left < 45 and not tiny:
      results.add("torch", "Train steps in turns", size=name, note=f"skipped: {clock.left:.0f} s were left")
      continue
    ours = None
    for layer in ("pattention", "dense"):
      label = {"size": name, "T": length, "B": rows, "PyTorch's layer": layer}
      if clock.left < 25 and not tiny:
        results.add("torch", "Train steps in turns", **label, note="skipped: no time was left")
        continue
      theirs = None
      try:
        ours = ours or Running(compiled_step(name, length, "none", rows))
        begin = time.perf_counter()
        theirs = Torch(ours.model, rows, layer, compiled=not tiny)
        theirs.run(3)
        prepared = time.perf_counter() - begin
        ours.run(3)
        calls = 1 if tiny else max(1, min(10, int(0.5 / ours.run()[0])))
        taken = [(ours.run(calls), theirs.run(calls)) for _ in range(_ROUNDS)]
        mine, other = (statistics.median(side[0] for side in sides) for sides in zip(*taken))
        tokens = rows * length
        results.add(
          "torch",
          "Train steps in turns",
          **label,
          **{
            "ours ms": 1e3 * mine,
            "PyTorch ms": 1e3 * other,
            "ours is faster": other / mine,
            "ours tokens/s": tokens / mine,
            "PyTorch tokens/s": tokens / other,
            "PyTorch peak GB": theirs.peak() / 1e9,
            "losses": f"{taken[-1][0][1]:.3f}, {taken[-1][1][1]:.3f}",
            "PyTorch compiled in s": prepared,
          },
        )
      except Exception as error:
        results.add(
          "torch", "Train steps in turns", **label, note=f"failed: {type(error).__name__}: {str(error)[:300]}"
        )
      if theirs is not None:
        theirs.close()
