"""What a run's programs need on TPUs and GPUs that are not there."""

import math

import pytest

from tokenformer_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from tokenformer_jax.distributed.chips import CHIPS
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.distributed.topologies import can_compile, parse_topology, slice_devices
from tokenformer_jax.training import compile_check
from tokenformer_jax.training.compile_check import check, report

MODEL = ModelConfig(
  vocab_size=512,
  num_layers=2,
  hidden_size=256,
  num_heads=4,
  qkv_tokens=256,
  proj_tokens=128,
  ffn_tokens=512,
  seq_length=128,
  compute_dtype="bfloat16",
  remat="full",
)
needs_libtpu, needs_cuda = (
  pytest.mark.skipif(bool(can_compile(CHIPS[chip])), reason=can_compile(CHIPS[chip])) for chip in ("v5e", "h100")
)


def config(batch_size: int = 16, **mesh) -> Config:
  return Config(model=MODEL, data=DataConfig(batch_size=batch_size), mesh=MeshConfig(**mesh))


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v5e", "expected a chip and the sizes of a slice"),
    ("v5e:4x", "expected a chip"),
    ("4x4", "expected a chip"),
    ("v5:4x4", "chip 'v5' is unknown: choose one of v4, v5e, v5p, v6e, a100, h100, h200. Did you mean"),
    ("v5e:4x4x4", "a slice of v5e has 2 sizes"),
    ("v5p:4x4", "a slice of v5p has 3 sizes"),
    ("v5e:0x4", "a slice of v5e has 2 sizes, from 1 on"),
    ("h100:9", "a machine has 1 to 8 GPUs, as h100:8"),
    ("a100:0", "a machine has 1 to 8 GPUs"),
    ("h200:2x4", "a machine has 1 to 8 GPUs"),
  ],
)
def test_a_topology_that_is_none_is_refused(topology, message):
  with pytest.raises(ValueError, match=f"topology='{topology}': {message}"):
    parse_topology(topology)


def test_a_topology_is_a_chip_and_sizes():
  assert parse_topology("v5p:2x2x4") == (CHIPS["v5p"], (2, 2, 4))
  assert parse_topology("h100:8") == (CHIPS["h100"], (8,))


@pytest.fixture
def no_compiler(monkeypatch):
  monkeypatch.setattr(compile_check, "can_compile", lambda chip: "none here")


@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:8"])
def test_without_a_compiler_the_programs_are_lowered_and_their_arguments_counted(no_compiler, topology):
  train, decode = check(config(data=2, fsdp=2, token=2), topology)
  chip, _ = parse_topology(topology)
  assert train.peak is None and train.sent is None and train.sent_seconds == {}
  # The final norm is whole on each chip; so are a step count, the rows' ages and τ.
  norm, matrices = 2 * 256, MODEL.num_parameters - 2 * 256
  assert train.held["parameters"] == 4 * (matrices // 4 + norm)
  assert 2 * train.held["parameters"] < train.held["optimizer state"] < 2.1 * train.held["parameters"]
  # Backward is twice the forward; remat runs a layer again, but for its last product, and attention's scores once
  # more; of them three in four are computed, where half are seen.
  tokens, seen = 16 * 128, MODEL.num_layers * 2 * 128 * 256
  assert train.model_flops == 3 * MODEL.forward_flops_per_token * tokens / 8
  pattentions = MODEL.forward_flops_per_token - 2 * 512 * 256 - seen
  assert (
    train.flops
    == (4 * pattentions - MODEL.num_layers * 2 * 512 * 256 + 9 * 0.75 * seen + 3 * 2 * 512 * 256) * tokens / 8
  )
  assert train.step_seconds == (max(train.compute_seconds, train.memory_seconds),) * 2
  assert train.compute_seconds == train.flops / chip.peak_flops and train.tokens == tokens
  assert decode.tokens == 16 and decode.memory_seconds == sum(decode.held.values()) / chip.memory_bandwidth
  assert "were nothing sent" in report(config(data=2, fsdp=2, token=2), topology, [train, decode])


def test_what_the_mesh_cannot_split_is_refused_before_anything_is_compiled(no_compiler):
  with pytest.raises(ValueError, match="key/keys: param_token=256 cannot be split over the 3 devices"):
    check(config(data=1, token=3), "v5e:1x3")
  with pytest.raises(ValueError, match="mesh data=1, .* takes 2 devices, but there are 8"):
    check(config(data=1, token=2), "v5e:2x4")


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5e:1x1", "v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v6e:4x4"])
def test_a_chip_is_one_device(topology):
  chip, sizes = parse_topology(topology)
  devices = slice_devices(topology)
  assert len(devices) == math.prod(sizes) and devices[0].device_kind.startswith(chip.kinds)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
def test_compiled_for_a_slice_what_is_sent_and_held_is_known():
  train, decode = check(config(data=1, fsdp=2, token=2), "v5e:2x2")
  for one in (train, decode):
    assert sum(one.held.values()) < one.peak < one.chip.memory
    assert one.step_seconds[0] < one.step_seconds[1]
  # Every layer's parameters are gathered along fsdp, forward and again for the remat, in bfloat16.
  gathered = sum(c.trips * c.bytes for c in train.sent if c.kind == "all-gather" and c.axes == ("fsdp",))
  assert gathered >= 2 * 2 * MODEL.num_non_embedding_parameters / 2
  assert {axis for c in train.sent for axis in c.axes} == {"fsdp", "token"}
  lines = report(config(data=1, fsdp=2, token=2), "v5e:2x2", [train, decode])
  assert "mesh fsdp=2, token=2" in lines and "sent along fsdp" in lines and "nothing hidden" in lines


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
@pytest.mark.parametrize("chip", ["a100", "h100", "h200"])
def test_compiled_for_gpus_attention_is_cudnns(chip, monkeypatch):
  texts = []
  monkeypatch.setattr(compile_check, "collectives", lambda text, mesh: texts.append(text) or collectives(text, mesh))
  train, decode = check(config(data=1, fsdp=2, token=2), f"{chip}:4")
  for one in (train, decode):
    assert sum(one.held.values()) < one.peak < one.chip.memory
  assert {axis for c in train.sent for axis in c.axes} == {"fsdp", "token"}
  # Layers' parameters are gathered in bfloat16, and their gradients added up in float32.
  assert {c.dtype for c in train.sent if c.kind == "all-gather" and c.trips > 1} == {"bf16"}
  assert {c.dtype for c in train.sent if c.kind in ("reduce-scatter", "all-reduce") and c.axes == ("fsdp",)} == {"f32"}
  assert "__cudnn$fmhaSoftmaxBackward" in texts[0]
  # Of attention's products it does all that is seen: two, two again for the remat, and five.
  tokens, seen = 16 * 128, MODEL.num_layers * 2 * 128 * 256
  pattentions = MODEL.forward_flops_per_token - 2 * 512 * 256 - seen
  assert (
    train.flops == (4 * pattentions - MODEL.num_layers * 2 * 512 * 256 + 9 / 2 * seen + 3 * 2 * 512 * 256) * tokens / 4
  )


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
def test_a_gpu_decodes_one_row_without_writing_out_what_it_multiplies():
  _, decode = check(config(batch_size=1), "h100:1")
  assert decode.peak - sum(decode.held.values()) < 4 * MODEL.ffn_tokens * MODEL.hidden_size


@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
@pytest.mark.parametrize(
  "topology, said",
  [
    pytest.param("v5e:2x2", "Ran out of memory .*15.75G.*", marks=needs_libtpu),
    pytest.param("h100:1", "it takes .* GiB of 80.", marks=needs_cuda),
  ],
)
def test_what_does_not_fit_is_said(topology, said):
  with pytest.raises(ValueError, match=f"the train step does not fit: {said} Take more chips"):
    check(config(batch_size=2**18), topology)
