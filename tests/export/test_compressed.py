"""compressed-tensors against the library's own decompression, and through transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solving import solve

from lissom.core import FormatError, Grid, Sparse
from lissom.export import CompressedTensors, LayerPlan, Layout, load, open_model

PACK, INT8, ZERO = CompressedTensors(), CompressedTensors("int-quantized"), CompressedTensors(zero_points=True)


def library_weight(codec, solved):
    """What compressed-tensors itself decodes from our tensors and our config."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors, entry = codec.encode(solved, Layout()), codec.entry(solved, Layout())
    config = QuantizationConfig.model_validate(codec.config({"layer": entry}, Layout()))
    (scheme,) = config.config_groups.values()
    tensors["weight_scale"] = tensors["weight_scale"].float()  # as transformers does for a float32 model
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.sampled_from([16, 24, 32]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    channel=st.booleans(),
    codec=st.sampled_from([PACK, ZERO]),
)
def test_the_library_and_lissom_decode_the_solved_weights(rows, groups, size, bits, symmetric, channel, codec):
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(rows)) * 3 + 0.1
    solved = solve(weight, Sparse(0.3), Grid(bits, None if channel else size, symmetric))
    if codec is PACK or rows > 8:  # the library itself cannot unpack zero points of 4 bits in a single word
        assert torch.equal(library_weight(codec, solved), solved.weight)
    back = codec.decode(codec.encode(solved, Layout()), codec.entry(solved, Layout()))
    assert torch.equal(back.weight, solved.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_int_quantized(symmetric, group):
    solved = solve(torch.randn(5, 48), None, Grid(8, group, symmetric))
    assert torch.equal(library_weight(INT8, solved), solved.weight)
    tensors, entry = INT8.encode(solved, Layout()), INT8.entry(solved, Layout())
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(INT8.decode(tensors, entry).weight, solved.weight)


MIXED = [
    Grid(4, 16, False), Grid(3, None, True), Grid(2, 8, True), Grid(5, None, True), Grid(8, None, False),
    Grid(7, None, False), None,
]  # fmt: skip


@pytest.mark.parametrize(
    ("codec", "grids"),
    [
        (PACK, [Grid(4, 16, True)]),
        (PACK, [Grid(4, 16, False)]),
        (PACK, [Grid(8, None, True)]),
        (PACK, MIXED),
        (INT8, [Grid(8, None, True)]),
        (INT8, [Grid(8, 32, False)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_loads_it_and_gives_the_same_logits(artefact, ids, codec, grids, dtype):
    from transformers import AutoModelForCausalLM

    folder, weights = artefact(codec, grids, None, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, "float32")
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    state = ours.state_dict()
    for name, weight in weights.items():
        stored = weight if grids[0] is not None and len(grids) == 1 else None
        if stored is not None:
            assert torch.equal(state[f"{name}.weight"], stored)
            assert torch.equal(theirs.get_submodule(name).weight, stored)


def test_standard_zero_points_load_with_dequantize(artefact):
    """The form for vLLM. Transformers' own route for it, where all layers have one scheme."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder, weights = artefact(ZERO, [Grid(4, 16, False)])
    config = open_model(folder)
    assert all(e["bits"] == 4 and not e["symmetric"] for e in config.entries.values())
    quantization = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization).eval()
    for name, weight in weights.items():
        assert torch.equal(load(folder, "float32").get_submodule(name).weight, weight)
        assert torch.equal(theirs.get_submodule(name).weight, weight.half())  # this route multiplies in float16


def test_the_default_route_still_cannot_load_packed_zero_points(artefact):
    """When this fails, the libraries have mended it: asymmetric layers need no extra bit any more."""
    from transformers import AutoModelForCausalLM

    folder, _ = artefact(ZERO, [Grid(4, 16, False)])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_layers_of_different_bits_make_groups_with_explicit_targets():
    layers = {f"model.l{b}": solve(torch.randn(4, 32), None, Grid(b, 16, True)) for b in (3, 4)}
    layers["model.also4"] = solve(torch.randn(4, 32), None, Grid(4, 16, True))
    layers["model.plain"] = solve(torch.randn(4, 32))
    config = PACK.config({name: PACK.entry(s, Layout()) for name, s in layers.items()}, Layout())
    assert config is not None
    groups = config["config_groups"].values()
    assert [(g["weights"]["num_bits"], g["targets"]) for g in groups] == [
        (3, ["model.l3"]),
        (4, ["model.also4", "model.l4"]),
    ]
    assert config["ignore"] == ["model.plain", "lm_head"]
    assert config["quantization_status"] == "compressed" and config["format"] == "pack-quantized"


def test_check_names_what_does_not_fit():
    assert "choose 64, 96, 144 or group_size 0" in PACK.check(LayerPlan("l", (576, 576), bits=4, group_size=128))[0]
    assert "8 bits, not 4" in INT8.check(LayerPlan("l", (4, 32), bits=4))[0]
    assert "Conv1D" in PACK.check(LayerPlan("l", (4, 32), bits=4, transposed=True))[0]
    assert "embeddings" in PACK.check(LayerPlan("l", (4, 32), bits=4, kind="embedding"))[0]
    assert not PACK.check(LayerPlan("l", (576, 576), bits=4, group_size=64))
    assert not PACK.check(LayerPlan("l", (576, 576), "2:4"))
    assert "sparsity saves no bytes" in PACK.advice(LayerPlan("l", (4, 32), "2:4"))[0]
    assert "5 bits, symmetric" in PACK.advice(LayerPlan("l", (4, 32), bits=4))[0]
    with pytest.raises(FormatError, match="divide the 40 inputs"):
        PACK.encode(solve(torch.randn(3, 40), None, Grid(4, 16)), Layout())


def test_damage_is_found():
    solved = solve(torch.randn(8, 32), None, Grid(4, 16))
    tensors, entry = ZERO.encode(solved, Layout()), ZERO.entry(solved, Layout())

    def broken(**change):
        with pytest.raises(FormatError) as error:
            ZERO.decode(tensors | change, entry)
        return str(error.value)

    assert "weight_packed has shape" in broken(weight_packed=tensors["weight_packed"][:, :-1])
    assert "finite" in broken(weight_scale=tensors["weight_scale"] * float("nan"))
    assert "weight_scale must be" in broken(weight_scale=tensors["weight_scale"][:, :1])
    assert "weight_zero_point has shape" in broken(weight_zero_point=tensors["weight_zero_point"][:, :1])
    assert "must have the tensors" in broken(weight_g_idx=torch.zeros(32))
