"""Rounded activations and caches from recipe to artefact to evaluation, and through transformers."""

import dataclasses
import json

import pytest
import torch

import tiny
from lissom.core import FormatError, RecipeError, Stats
from lissom.evaluate import evaluate
from lissom.export import load, open_model
from lissom.methods.quantize.activations import round_input
from lissom.methods.quantize.kv_cache import CacheGrid, KVCache, fake_cache_static
from lissom.models import InputGrid, Model, Operators
from lissom.models.operators import BlockOperators, read_operators
from lissom.pipeline import compress, plan
from lissom.pipeline.operating import cache_grids
from lissom.pipeline.stream import stream_block
from lissom.pipeline.verify import cache_is_rounded

IDS = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(0))
SMALL = ["samples=4", "length=32", f"calibration.data={tiny.__file__}"]
INT8 = {"use": "rtn", "bits": 8, "group_size": 0, "symmetric": True}
INT4 = {"use": "rtn", "bits": 4, "group_size": 16, "symmetric": True}
CT_CACHE = {"use": "kv-cache", "keys": "token", "zero": "integer", "group_size": 8}


def with_operators(source, operators):
    model = Model(open_model(source))
    model.operators = operators
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom-odd", "phi", "opt-350m", "gemma2"])
def test_inputs_are_rounded_and_the_residual_is_not(random_checkpoint, kind):
    """Against hooks that round the inputs of every linear layer of the transformers model."""
    from transformers import AutoModelForCausalLM

    source = random_checkpoint(kind)
    model = with_operators(source, Operators(InputGrid(4, (0, 1, 2, 3))))
    names = {la.name for i in range(model.blocks) for la in model.linears(i)}
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, module in theirs.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda _, args: (round_input(args[0], 4), *args[1:]))
    with torch.no_grad():
        expected = theirs(IDS).logits
    found = model.forward(IDS)
    # a last bit decides some roundings: nearly all logits agree closely, none is far
    gap = (found - expected).abs() / expected.abs().max()
    assert float(gap.quantile(0.5)) < 1e-4 and float(gap.max()) < 0.3
    plain = with_operators(source, Operators()).forward(IDS)
    assert float((plain - expected).abs().quantile(0.5) / expected.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "mistral", "phi3"])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_rounded_cache_is_what_decoding_token_by_token_gives(random_checkpoint, kind, per):
    """The last token's logits do not change when the text after it does, nor with how much text is run at once."""
    grid = CacheGrid(3, per, 4, 3)
    model = with_operators(random_checkpoint(kind), Operators(cache=(grid, grid)))
    whole = model.forward(IDS)
    for tokens in (9, 12, 17):
        torch.testing.assert_close(model.forward(IDS[:, :tokens]), whole[:, :tokens], atol=1e-4, rtol=1e-4)
    plain = with_operators(random_checkpoint(kind), Operators()).forward(IDS)
    assert not torch.allclose(plain, whole, atol=1e-3)
    fine = dataclasses.replace(grid, bits=8)
    near = with_operators(random_checkpoint(kind), Operators(cache=(fine, fine))).forward(IDS)
    assert (near - plain).abs().mean() < (whole - plain).abs().mean() / 8


def test_a_turned_cache_and_a_cache_of_recent_tokens_change_nothing(random_checkpoint):
    source = random_checkpoint("llama")
    plain = Model(open_model(source)).forward(IDS)
    all_recent = CacheGrid(2, "token", 4, 64)
    torch.testing.assert_close(
        with_operators(source, Operators(cache=(all_recent, all_recent))).forward(IDS), plain, atol=1e-4, rtol=1e-4
    )
    from lissom.core import Rotation

    torch.testing.assert_close(
        with_operators(source, Operators(turn_heads=Rotation(8, 0))).forward(IDS), plain, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("steps", "form"),
    [
        ([INT8, {"use": "activations"}], "int-quantized"),
        ([INT4, {"use": "activations"}], "pack-quantized"),
        ([INT8, {"use": "activations", "bits": 4}], "int-quantized"),
        ([INT8, {"use": "activations", "per": "tensor", "calibrate": "percentile"}], "int-quantized"),
        ([INT4, CT_CACHE], "pack-quantized"),
        ([CT_CACHE | {"bits": 2}], "dense"),
    ],
)
def test_transformers_runs_the_artefact_as_lissom_does(random_checkpoint, tmp_path, steps, form):
    from transformers import AutoModelForCausalLM

    source, out = random_checkpoint("llama"), tmp_path / "out"
    made = compress(source, out, steps, overrides=[*SMALL, "format=compressed-tensors", "dtype=float32"])
    assert "rounded" in made["verified"]["transformers"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == form
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    model = Model(open_model(out))
    size = expected.abs().max()
    if model.operators.cache and not cache_is_rounded(theirs):  # transformers 5.24 with compressed-tensors 0.20
        assert "both without the rounded cache" in made["verified"]["transformers"]
        model.operators = dataclasses.replace(model.operators, cache=None)
        torch.testing.assert_close(model.forward(IDS), expected, atol=2e-4, rtol=2e-4)
        return
    assert float((model.forward(IDS) - expected).abs().quantile(0.9) / size) < 1e-4
    model.operators = Operators()
    assert float((model.forward(IDS) - expected).abs().quantile(0.9) / size) > 1e-4  # both do round


def test_directories_of_other_tools_are_honoured_or_refused(random_checkpoint, tmp_path):
    out = tmp_path / "out"
    compress(random_checkpoint("llama"), out, [INT8, {"use": "activations"}],
             overrides=[*SMALL, "format=compressed-tensors"])  # fmt: skip
    ours = Model(open_model(out)).operators
    config = json.loads((out / "config.json").read_text())
    del config["lissom_operators"]
    (out / "config.json").write_text(json.dumps(config))
    assert Model(open_model(out)).operators == ours
    args = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    args["symmetric"] = False
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="not honoured"):
        open_model(out)


def test_statistics_see_rounded_inputs_and_static_scales_are_found_first(random_checkpoint):
    model = Model(open_model(random_checkpoint("llama")))
    raw, seen = {}, {}
    hidden = [model.embed(IDS)]
    stream_block(model.load_block(0), [hidden[0].clone()], lambda s, stats: raw.update({s[0].stage: stats}))
    block = model.load_block(0)
    block.operators = BlockOperators(Operators(InputGrid(3, (0, 3), static=True)), 0)
    stream_block(
        block, [hidden[0].clone()], lambda s, stats: seen.update({s[0].stage: stats}),
        calibrate=lambda x, tops: float(tops.max()) / 4,
    )  # fmt: skip
    assert set(block.operators.scales) == {0, 3}
    x = block._norm(hidden[0], "input_layernorm")
    expected = Stats.of(round_input(x, 3, float(x.abs().max()) / 4))
    torch.testing.assert_close(seen[0].gram, expected.gram)
    assert not torch.allclose(seen[0].gram, raw[0].gram)


def test_evaluation_counts_the_operators_and_more_bits_are_better(trained, tmp_path):
    found = {}
    for bits in (2, 4, 8):
        out = tmp_path / str(bits)
        compress(trained, out, [INT8, {"use": "activations", "bits": bits}], overrides=[*SMALL, "format=packed"])
        found[bits] = evaluate(out, length=64, count=4)["perplexity"]
    dense = evaluate(trained, length=64, count=4)["perplexity"]
    assert found[2] > found[4] > found[8] and found[8] == pytest.approx(dense, rel=0.02)
    for bits in (2, 4):
        out = tmp_path / f"kv{bits}"
        compress(trained, out, "kv4", overrides=[*SMALL, f"bits={bits}", "group_size=8"])
        found[bits] = evaluate(out, length=64, count=4)["perplexity"]
    assert found[2] > found[4] > dense * 0.99


def test_operators_survive_resuming_and_compressing_again(random_checkpoint, tmp_path):
    steps = [INT8, {"use": "activations", "per": "tensor"}]
    compress(random_checkpoint("llama"), tmp_path / "a", steps, overrides=[*SMALL, "format=packed"])
    first = Model(open_model(tmp_path / "a")).operators
    assert first.activations is not None and len(first.activations.scales) == 8
    again = compress(tmp_path / "a", tmp_path / "b", [INT8], overrides=[*SMALL, "format=packed"])
    assert Model(open_model(tmp_path / "b")).operators == first and again["operators"] == first.describe()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert all(row["input_scale"] > 0 for row in manifest["layers"])
    assert load(tmp_path / "a") is not None


@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_cache_with_static_grids(trained, tmp_path, per):
    """Grids of every block are in the artefact, later tokens change nothing, and 8 bits are nearly the dense model."""
    steps = [INT8, {"use": "kv-cache", "static": True, "keys": per, "group_size": 4, "rotate": True, "bits": 8}]
    compress(trained, tmp_path / "8", steps, overrides=[*SMALL, "format=packed"])
    model = Model(open_model(tmp_path / "8"))
    assert (
        sorted(model.operators.cache_grids) == [0, 1, 2, 3]
        and read_operators(json.loads(json.dumps(model.operators.describe()))) == model.operators
    )
    whole = model.forward(IDS)
    torch.testing.assert_close(model.forward(IDS[:, :7]), whole[:, :7], atol=1e-4, rtol=1e-4)
    block = model.load_block(1)
    assert block.operators is not None
    k, v = torch.randn(2, 1, model.config.num_key_value_heads, 5, block.sizes.head_dim).unbind()
    kept = block.operators.cached(k, v)
    scale, zero = (torch.tensor(t)[:, None] for t in model.operators.cache_grids[1][0])
    assert kept is not None and kept[0].fresh is None
    torch.testing.assert_close(kept[0].old, ((k / scale).round() + zero).clamp(0, 255).sub(zero) * scale)
    compress(trained, tmp_path / "2", steps, overrides=[*SMALL, "format=packed", "kv-cache.bits=2"])
    found = [evaluate(tmp_path / n, length=64, count=4)["perplexity"] for n in ("8", "2")]
    dense = evaluate(trained, length=64, count=4)["perplexity"]
    assert found[0] == pytest.approx(dense, rel=0.02) and found[1] > found[0] * 1.01
    model.operators = dataclasses.replace(model.operators, cache_grids={})
    with pytest.raises(FormatError, match="static grids of its cache are missing"):
        model.forward(IDS)


def test_static_grids_of_keys_hold_at_the_end_of_the_context(trained):
    """The keys of short samples, read again where a long text would have them."""
    model = Model(open_model(trained))
    model.operators = Operators(cache=KVCache(8, keys="channel", static=True).grids())
    ids = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    scale, zero = (torch.tensor(t)[:, None] for t in cache_grids(model, 100.0, ids)[0][0])
    block, seen = model.load_block(0), []
    block.operators = BlockOperators(model.operators, 0)
    block.operators.observe = lambda k, v: seen.append(k)
    far = torch.arange(16)[None] + model.config.max_position_embeddings - 16
    block.forward(model.embed(ids), far)
    clipped = (fake_cache_static(seen[0], scale, zero, 8) - seen[0]).abs() > scale
    assert float(clipped.float().mean()) < 0.02


def test_a_static_artefact_can_be_healed(trained, tmp_path):
    steps = [
        INT8, {"use": "activations", "per": "tensor"},
        {"use": "heal", "steps": 2, "batch": 2, "length": 32, "held_out": 1, "evaluate_every": 2},
    ]  # fmt: skip
    made = compress(trained, tmp_path / "out", steps, overrides=[*SMALL, "format=compressed-tensors"])
    assert "rounded" in made["verified"]["transformers"]


def test_a_rotation_at_run_time_is_refused_by_loaders_that_do_not_turn(random_checkpoint, tmp_path):
    steps = [{"use": "quarot", "online": True}, INT4]
    compress(random_checkpoint("llama"), tmp_path / "out", steps, overrides=[*SMALL, "format=packed"])
    with pytest.raises(FormatError, match="online"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "steps", "overrides", "words"),
    [
        ("llama", [INT8, {"use": "activations", "only": ["q"]}], [], "same input"),
        ("llama", [INT8, {"use": "activations", "only": ["qkv"]}], [], "names no layer"),
        ("llama", [INT8, {"use": "activations"}, {"use": "activations"}], [], "keep one"),
        ("llama", [INT8, {"use": "activations", "bits": 9}], [], "2 … 8"),
        ("bert", [INT8, {"use": "kv-cache"}], [], "keeps no cache"),
        ("llama", [INT8, {"use": "kv-cache", "group_size": 5}], [], "do not divide heads of 8"),
        ("llama", [INT8, {"use": "kv-cache"}], ["format=compressed-tensors"], "keys per token, zero: integer"),
        ("llama", [INT8, CT_CACHE | {"static": True}], ["format=compressed-tensors"], "static: false"),
        ("llama", [INT8, CT_CACHE | {"group_size": 64}], ["format=compressed-tensors"], "divides heads of 8"),
        ("llama", [INT8 | {"only": ["o"]}, {"use": "activations"}], ["format=compressed-tensors"], "has no bits"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_plan(random_checkpoint, kind, steps, overrides, words):
    with pytest.raises(RecipeError, match=words):
        plan(random_checkpoint(kind), steps, overrides=overrides)


def test_operators_read_back_and_damage_is_named():
    grid = CacheGrid(4, "channel", 32)
    given = Operators(InputGrid(8, (0, 3), True, {"0.0": 0.5}), (grid, dataclasses.replace(grid, per="token")))
    assert read_operators(json.loads(json.dumps(given.describe()))) == given
    for bad in ({"wings": 2}, {"activations": {"bits": 8}}, {"cache": {"keys": {"bits": 99}, "values": {}}}, [1]):
        with pytest.raises(FormatError, match="not understood"):
            read_operators(bad)
