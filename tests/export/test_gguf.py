"""GGUF: blocks against the gguf library's own dequantization, files read back by transformers and lissom."""

import json

import pytest
import torch
from solving import solve
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.core import FormatError, Grid, OutputError, Problem, RecipeError, Stats
from lissom.export import ArtefactWriter, Layout, Packed, export_gguf, load, open_model
from lissom.export.ggml_blocks import encode_blocks, exact_types, q4_1_error
from lissom.methods import METHODS
from lissom.models import Model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True), (4, False), (8, True), (7, False)])
def test_blocks_decode_to_lissoms_weights(kind, group, bits, symmetric):
    from gguf import GGMLQuantizationType, dequantize

    codes = solve(torch.randn(6, 128) + 0.2, None, Grid(bits, group, symmetric)).codes
    assert codes is not None
    limit = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[kind]
    span = 2 ** (bits - 1) if symmetric else 2**bits - 1
    if span <= limit - (not symmetric):
        assert kind in exact_types(codes)
    if kind in exact_types(codes):
        back = torch.from_numpy(dequantize(encode_blocks(codes, kind), GGMLQuantizationType[kind]))
        assert torch.equal(back, codes.decode())
    else:
        assert span > limit - 1


def test_exact_types_come_smallest_first_and_need_whole_blocks():
    def types(bits, group, symmetric, columns=128):
        codes = solve(torch.randn(40, columns), None, Grid(bits, group, symmetric)).codes
        assert codes is not None
        return exact_types(codes)

    assert types(4, 32, True) == ["Q4_0", "Q5_0", "Q8_0"]
    assert types(4, 32, False) == ["Q5_0", "Q8_0"]
    assert types(8, 32, True) == ["Q8_0"]
    assert types(8, 32, False) == []
    assert types(4, 16, True) == []
    assert types(4, 48, True, 96) == []
    assert types(4, None, True, 40) == []


def test_q4_1_moves_weights_by_the_rounding_of_the_minimum():
    from gguf import GGMLQuantizationType, dequantize

    codes = solve(torch.randn(6, 128) + 0.3, None, Grid(4, 32, False)).codes
    assert codes is not None
    back = torch.from_numpy(dequantize(encode_blocks(codes, "Q4_1"), GGMLQuantizationType.Q4_1))
    gap = float((back - codes.decode()).abs().max())
    assert 0 < gap <= q4_1_error(codes) * 1.01 + 1e-6
    assert gap < 2e-3


@pytest.mark.parametrize(
    ("method", "kind", "settings"), [("hqq", "Q4_1", {}), ("codebook", "MXFP4", {"table": "mxfp4"})]
)
def test_other_forms_have_blocks_of_their_own(method, kind, settings):
    from gguf import GGMLQuantizationType, dequantize

    W = torch.randn(8, 128) * torch.logspace(-3, 2, 8)[:, None] + 0.01
    W[2, 32:64] = 0
    problem = Problem.of(W, Stats.of(torch.randn(50, 128)), Grid(4, 32))
    row = METHODS[method]
    form = problem.split(row.run(problem, row.config(**settings)))["layer"].stored
    assert exact_types(form) == [kind]
    back = torch.from_numpy(dequantize(encode_blocks(form, kind), GGMLQuantizationType[kind]))
    assert torch.equal(back, form.decode())


def test_a_run_with_hqq_is_exact_in_gguf(dense, tmp_path):
    recipe = {"steps": [{"use": "hqq", "bits": 4, "group_size": 32}], "save": {"format": "packed", "dtype": "float16"}}
    lissom.compress(dense, tmp_path / "out", recipe, overrides=["calibration.samples=1", "calibration.length=8"])
    report = export_gguf(tmp_path / "out", tmp_path / "m.gguf")
    assert report["types"]["Q4_1"] == 14 and report["exact"]
    ours, again = open_model(tmp_path / "out"), open_model(tmp_path / "m.gguf")
    for name in ours.names():
        assert torch.equal(again.tensor(name), ours.tensor(name).float()), name


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    """A tiny model with a tokenizer, in fp16-exact weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<s>", *alphabet, "he", "ll"])}
    backend = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    tied = request.param == "llama"
    head = 128 if request.param == "qwen3" else 16  # transformers' GGUF loader ignores the head size of Qwen3
    config = AutoConfig.for_model(
        request.param, vocab_size=len(vocab) + 1, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).half().float()
    folder = tmp_path_factory.mktemp("gguf") / request.param
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                value.copy_(torch.randn_like(value) * 0.1 + 1)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def packed(dense, tmp_path):
    source = open_model(dense)
    model, codec = Model(source), Packed()
    grids = [Grid(4, 32, True), Grid(4, 32, False), Grid(8, 32, True), Grid(3, None, False), None]
    writer, tensors, entries = ArtefactWriter(tmp_path / "packed"), {}, {}
    for i in range(model.blocks):
        block = model.load_block(i)
        tensors |= block.tensors()
        for number, layer in enumerate(model.linears(i)):
            solved = solve(block.weight(layer.name), None, grids[number % len(grids)])
            del tensors[f"{layer.name}.weight"]
            entries[layer.name] = codec.entry(solved, Layout(torch.float16))
            tensors |= {f"{layer.name}.{k}": v for k, v in codec.encode(solved, Layout(torch.float16)).items()}
    writer.add("all", tensors | {n: source.tensor(n) for n in model.outer_names()}, entries)
    writer.finish(source, torch.float32, codec.config(entries, Layout(torch.float16)))
    return tmp_path / "packed"


def test_auto_is_exact_and_reads_back(packed, tmp_path):
    from transformers import AutoModelForCausalLM

    report = export_gguf(packed, tmp_path / "m.gguf")
    assert report["exact"] and report["notes"] == []
    assert set(report["types"]) == {"F16", "F32", "Q4_0", "Q5_0", "Q8_0"}
    ours, again = open_model(packed), open_model(tmp_path / "m.gguf")
    assert sorted(again.names()) == sorted(ours.names())
    for name in ours.names():
        assert torch.equal(again.tensor(name), ours.tensor(name).float()), name
    ids = torch.arange(20)[None] * 7 % 250
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, load(packed, "float32")(ids).logits, atol=1e-5)
    text = "hello 123 ü"
    assert again.tokenizer()(text).input_ids == ours.tokenizer()(text).input_ids


def test_nothing_is_quantized_again_without_saying_so(packed, dense, tmp_path):
    with pytest.raises(FormatError, match=r"cannot be stored as Q4_0 from lissom's codes: .*Q5_0, Q8_0 would be exact"):
        export_gguf(packed, tmp_path / "a.gguf", "Q4_0")
    assert list(tmp_path.glob("*.gguf*")) == []
    lines = []
    report = export_gguf(packed, tmp_path / "b.gguf", "Q4_0", requantize=True, note=lines.append)
    assert not report["exact"] and "quantized again" in report["notes"][0] and lines == report["notes"]
    plain = export_gguf(dense, tmp_path / "c.gguf", "Q8_0", requantize=True)
    assert plain["types"]["Q8_0"] == 14 and "14 matrices were quantized again" in plain["notes"][0]
    near = export_gguf(packed, tmp_path / "d.gguf", "Q4_1", requantize=True)
    assert any("weights move by up to" in n for n in near["notes"])
    half = export_gguf(packed, tmp_path / "e.gguf", "F16")
    assert set(half["types"]) == {"F16", "F32"} and "rounded to float16" in half["notes"][0]


def test_the_command_takes_block_types_in_small_letters(packed, tmp_path):
    done = CliRunner().invoke(app, ["export", str(packed), str(tmp_path / "m.gguf"), "--type", "f16", "--json"])
    assert done.exit_code == 0 and set(json.loads(done.stdout)["report"]["types"]) == {"F16", "F32"}


def test_bad_requests(dense, tiny, tmp_path):
    with pytest.raises(RecipeError, match="choose one of auto, F16"):
        export_gguf(dense, tmp_path / "a.gguf", "Q2_K")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(OutputError, match="exists"):
        export_gguf(dense, tmp_path / "there.gguf")
