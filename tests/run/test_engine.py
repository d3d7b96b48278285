"""The C++ decoder against the torch forward pass, and its invariance to how tokens are batched."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from lissom.core import Binary, CheckpointError, Codes, Grid, LissomError
from lissom.kernels import extension, isa
from lissom.methods.quantize.activations import round_input
from lissom.methods.quantize.kv_cache import CacheGrid
from lissom.models import Model, open_checkpoint
from lissom.models.operators import KEY, InputGrid, Operators
from lissom.run.engine import ContextError, Engine
from lissom.run.load import rounded
from tiny import tiny_model

pytestmark = pytest.mark.skipif(isa() == "torch", reason="needs the C++ extension")

KINDS = {
    "llama": {},
    "llama-tied": {"mlp_bias": False},
    "llama3-rope": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", path, max_position_embeddings=1024)
    return path


def tokens(n, seed=0):
    return torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(seed)).numpy()


def divergence(reference, logits):
    return F.kl_div(
        torch.from_numpy(logits).log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_torch_forward_pass(kind, tmp_path):
    tiny_model(kind, tmp_path, **KINDS[kind])
    ids = tokens(60)
    expected = Model(open_checkpoint(tmp_path)).forward(torch.from_numpy(ids)[None])[0]
    for cache_bits in (16, 8):
        engine = Engine(tmp_path, threads=2, context=128, cache_bits=cache_bits)
        # what is left is the rounding of weights, activations and cache to 8 bits
        assert divergence(expected, engine.step(ids, want="all")) < 3e-3
    shifted = engine.step(ids[1:], want="all")
    assert divergence(expected[1:], shifted) > 0.02  # the bound above is not vacuous


def test_a_token_does_not_depend_on_its_batch(llama):
    """Bit for bit: whole prompts, chunks, single tokens, other threads, other sequences in between."""
    ids, other = tokens(300), tokens(40, 1)
    whole = Engine(llama, threads=1, context=1024).step(ids, want="all")
    engine = Engine(llama, threads=2, context=1024, slots=2)
    engine.prefill(ids[:270], slot=1, chunk=32)
    for i in range(270, 300):
        j = i - 270
        logits = engine.step([other[j], ids[i]], [0, 1], [j, i], [True, True])
        assert np.array_equal(logits[1], whole[i])
    alone = Engine(llama, threads=1, context=64).step(other[:30], want="all")
    assert np.array_equal(logits[0], alone[29])


def test_sliding_window_forgets(tmp_path):
    tiny_model("mistral", tmp_path, num_hidden_layers=1, sliding_window=6)
    engine = Engine(tmp_path, context=128)
    a, b = tokens(80), tokens(80)
    b[:70] = tokens(70, 5)
    assert np.array_equal(engine.step(a)[0], engine.step(b)[0])
    b[76] = (b[76] + 1) % 300
    assert not np.array_equal(engine.step(a)[0], engine.step(b)[0])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases of q, k and v
@pytest.mark.parametrize("form", ["4:16 int4", "N:16 by row int4"])
def test_codes_are_packed_as_they_are(form, kind, tmp_path):
    """4-bit N:16 layers, also with rows in another order: same function as torch with the decoded weights."""
    tiny_model(kind, tmp_path, **KINDS[kind])
    model = Model(open_checkpoint(tmp_path))
    kept = {}

    def compress(name, weight):
        place, row = torch.arange(weight.shape[1]) % 16, torch.arange(len(weight))[:, None]
        keep = (place % 4 == 1).expand_as(weight) if form[0] == "4" else place <= row * 5 % 7
        columns = weight.shape[1]
        codes = Codes.round(weight * keep, Grid(4, columns).fit_all(weight * keep), 4)
        kept[name] = codes.decode() * keep
        return codes, keep

    engine = Engine(model, context=128, compress=compress)
    forms = [engine.layers.forms[linear.name] for i in range(model.blocks) for linear in model.linears(i)]
    # a layer of one strip has one number of slots
    assert set(forms) == {form} if form[0] == "4" else forms.count(form) > len(forms) // 2
    assert engine.bytes_per_token < Engine(model, context=128).bytes_per_token
    ids = tokens(50)
    h = model.embed(torch.from_numpy(ids)[None])
    for i in range(model.blocks):
        block = model.load_block(i)
        for linear in model.linears(i):
            block.set_weight(linear.name, kept[linear.name])
        h = block.forward(h)
    assert divergence(model.head(h)[0].detach(), engine.step(ids, want="all")) < 3e-3


@pytest.mark.parametrize("bits", [8, 6])
def test_rounding_at_load_is_to_the_nearest(bits):
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((64, 128), (65, 96), (66, 50)):
        weight = torch.randn(rows, columns, generator=generator)
        weight[0] = 0
        codes = rounded(weight, bits)
        best = Codes.round(weight, Grid(bits, codes.group_size, symmetric=True).fit_all(weight), bits, codes.group_size)
        error, bound = (codes.decode() - weight).abs(), codes.scale.repeat_interleave(codes.group_size, 1)[:, :columns]
        assert bool((error <= bound * 0.5 + bound * 2**bits * 2**-12).all())  # half a step; clipping by a rounded scale
        assert float(error.square().mean()) <= 1.05 * float((best.decode() - weight).square().mean())
        if columns % 32 == 0:  # the extension rounds and packs at once: the same codes, bit for bit
            weight[1, 3] = 0.5 * codes.scale[1, 0]  # a tie goes to the even code
            matrix, out = extension.Matrix.round(bits, weight.numpy(), codes.group_size), torch.empty(rows, columns)
            matrix.decode(out.numpy())
            assert torch.equal(out, rounded(weight, bits).decode())
            weight[1, 3] = float("nan")
            with pytest.raises(ValueError, match="finite"):
                extension.Matrix.round(bits, weight.numpy(), codes.group_size)


def operated(path, out, **operators):
    """A copy of a checkpoint whose config records operators."""
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {KEY: Operators(**operators).describe()}))
    return out


@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_are_rounded_as_in_torch(bits):
    x = torch.randn(9, 77, generator=torch.Generator().manual_seed(bits))
    x[3] = 0
    for scale in (0.0, 0.03):
        expected = round_input(x, bits, scale or None)
        got = x.clone()
        for row in got:
            extension.round_input(row.numpy(), bits, scale)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_sliding_window_gives_its_cache_back(tmp_path, bits):
    """A text four times as long as the cache, with the logits of a cache that holds it all."""
    tiny_model("mistral", tmp_path, sliding_window=40, max_position_embeddings=1200)
    small = Engine(tmp_path, context=320, cache_bits=bits)
    large = Engine(small.parts, context=1200, cache_bits=bits)
    ids = tokens(1100)
    assert small.longest == 1200 and small.blocks_for(1200) * 32 <= 320
    for engine in (small, large):
        engine.prefill(ids[:1000], chunk=100)
    for i in range(1000, 1100):
        assert np.array_equal(small.step(ids[i : i + 1], 0, i), large.step(ids[i : i + 1], 0, i))
    assert small.free_positions >= 320 - 32 * small.blocks_for(1200)
    with pytest.raises(ValueError, match="left behind"):
        small.step(ids[500:501], 0, 500)
    small.release()
    assert small.free_positions == 320


@pytest.mark.parametrize("static", [True, False])
def test_recorded_activations_are_rounded(llama, tmp_path, static):
    """With the recorded grid the engine agrees with torch, without it not."""
    scales = {f"{block}.{stage}": 0.05 for block in (0, 1) for stage in (0, 3)} if static else {}
    path = operated(llama, tmp_path / "out", activations=InputGrid(3 if static else 2, (0, 3), static, scales))
    ids = tokens(60)
    expected = Model(open_checkpoint(path)).forward(torch.from_numpy(ids)[None])[0]
    honoured, ignored = (divergence(expected, Engine(p, context=128).step(ids, want="all")) for p in (path, llama))
    # codes of a token's own scale flip where int8 weights move an input by a little, so the engines agree less there
    assert honoured < (0.05 if static else 0.7) * ignored and ignored > 0.1


def test_a_recorded_cache_is_used_or_refused(llama, tmp_path):
    for bits in (8, 4):
        grid = CacheGrid(bits, "token", 64)
        path = operated(llama, tmp_path / str(bits), cache=(grid, grid), turn_heads=None)
        assert Engine(path, context=64).cache_bits == bits
        assert Engine(path, context=64, cache_bits=16).cache_bits == 16
    for name, grids in {
        "channel": (CacheGrid(4, "channel"), CacheGrid(4, "token")),
        "few": (CacheGrid(2), CacheGrid(2)),
        "recent": (CacheGrid(8, recent=16), CacheGrid(8, recent=16)),
    }.items():
        path = operated(llama, tmp_path / name, cache=grids)
        with pytest.raises(CheckpointError, match=r"does not have.*--cache-bits"):
            Engine(path, context=64)
        assert Engine(path, context=64, cache_bits=8).cache_bits == 8


def test_the_cache_is_shared_and_given_back(llama):
    engine = Engine(llama, context=64, slots=2)
    engine.step(tokens(60), 0)
    with pytest.raises(ContextError, match="cache of 64 positions is full"):
        engine.step(tokens(40), 1)
    engine.release(0)
    engine.release(1)
    engine.step(tokens(60), 1)


def test_bad_input(llama, tmp_path):
    engine = Engine(llama, context=64)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.step([10_000])
    with pytest.raises(ValueError, match="slot"):
        engine.step([1], 7)
    with pytest.raises(ContextError, match="outside the model's context"):
        engine.step([1], 0, 5000)
    for wrong in ({"cache_bits": 5}, {"outer_bits": 4}):
        with pytest.raises(LissomError, match="bits, not"):
            Engine(llama, context=64, **wrong)
    tiny_model("gpt2", tmp_path)
    with pytest.raises(CheckpointError, match="no gpt2 blocks"):
        Engine(tmp_path)


def nibbles(x):
    """Groups of 32 of the last axis as the cache holds them with 4 bits: the largest element at code -8."""
    out = x.copy()
    for at in range(0, x.shape[-1], 32):
        part = x[..., at : at + 32]
        top = np.take_along_axis(part, np.abs(part).argmax(-1, keepdims=True), -1)
        scale = (top / -8).astype(np.float16).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        out[..., at : at + 32] = np.clip(np.rint(part * inverse), -8, 7) * scale
    return out


def eighths(x):
    """Heads as the cache holds them with 8 bits."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(x * inverse), -127, 127) * scale


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "window"), [(4, 2, 64, 0), (6, 6, 12, 0), (3, 1, 80, 0), (4, 2, 32, 41)]
)
def test_attention_over_every_cache(bits, heads, kv, dim, window):
    """Against softmax over keys and values rounded as the cache rounds them."""
    draw = np.random.default_rng(bits + dim)
    for positions, tokens in ((1, 1), (50, 50), (300, 9)):
        q = draw.normal(size=(tokens, heads, dim)).astype(np.float32)
        k = draw.normal(size=(positions, kv, dim)).astype(np.float32) * 2
        v = draw.normal(size=(positions, kv, dim)).astype(np.float32)
        v[0] = 0
        kept = {16: lambda x: x.astype(np.float16).astype(np.float32), 8: eighths, 4: nibbles}[bits]
        out = np.empty((tokens, heads * dim), np.float32)
        extension.attention(q, k, v, bits, window, dim**-0.5, out)
        keys, values = (np.repeat(kept(x), heads // kv, 1) for x in (k, v))
        at = np.arange(positions - tokens, positions)[:, None] - np.arange(positions)
        seen = (at >= 0) & (at < (window or positions + 1))
        scores = np.einsum("thd,phd->thp", q, keys) * dim**-0.5
        scores = np.where(seen[:, None], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        expected = np.einsum("thp,phd->thd", p, values).reshape(tokens, -1)
        assert np.abs(out - expected).max() < 2e-4  # 8 bits: a tie that rounds the other way moves one code


def test_four_bits_of_cache_cost_little_and_save_most(llama):
    sizes = {bits: Engine(llama, context=128, cache_bits=bits) for bits in (16, 8, 4)}
    ids = tokens(60)
    expected = torch.from_numpy(sizes[16].step(ids, want="all"))
    lost = {bits: divergence(expected, sizes[bits].step(ids, want="all")) for bits in (8, 4)}
    assert lost[8] < lost[4] < 0.05


def test_binary_coded_layers(tmp_path):
    """LUT-GEMM inside the decoder: same function as torch with the decoded weights."""
    tiny_model("llama", tmp_path, hidden_size=64, intermediate_size=96)
    model = Model(open_checkpoint(tmp_path))
    kept = {}

    def compress(name, weight):
        planes, rest, alphas = [], weight, []
        for _ in range(4):  # greedy: the sign of what is left, at its mean size in each 32 inputs
            alpha = rest.abs().reshape(len(weight), -1, 32).mean(2).half().float()
            planes.append(rest >= 0)
            alphas.append(alpha)
            rest = rest - torch.where(rest >= 0, 1.0, -1.0) * alpha.repeat_interleave(32, 1)
        made = Binary(torch.stack(planes), torch.stack(alphas), torch.zeros_like(alphas[0]), 32)
        kept[name] = made.decode()
        if name.endswith("k_proj"):  # a neighbour of another kind in the same product
            codes = rounded(weight)
            kept[name] = codes.decode()
            return codes, None
        return made, None

    engine = Engine(model, context=128, compress=compress, threads=2)
    assert set(engine.layers.forms.values()) == {"binary × 4", "int8"}
    ids = tokens(50)
    h = model.embed(torch.from_numpy(ids)[None])
    for i in range(model.blocks):
        block = model.load_block(i)
        for linear in model.linears(i):
            block.set_weight(linear.name, kept[linear.name])
        h = block.forward(h)
    assert divergence(model.head(h)[0].detach(), engine.step(ids, want="all")) < 3e-3


def test_a_binary_coded_checkpoint_runs_as_it_is_stored(tmp_path):
    import lissom

    tiny_model("llama", tmp_path / "dense", hidden_size=64, intermediate_size=96)
    recipe = {"steps": [{"use": "bcq", "bits": 3, "group_size": 32, "rounds": 2}], "save": {"format": "packed"}}
    lissom.compress(tmp_path / "dense", tmp_path / "out", recipe, overrides=["samples=1", "length=16"])
    engine = Engine(tmp_path / "out", threads=1)
    names = [n for n in engine.layers.forms if "_proj" in n]
    assert len(names) == 14 and all(engine.layers.forms[n] == "binary × 3" for n in names)


def test_damaged_checkpoints_are_refused(tmp_path):
    """A packed 4:16 checkpoint with a changed byte, cut short, or with a position that does not exist."""
    import lissom

    tiny_model("llama", tmp_path / "dense", hidden_size=64, intermediate_size=96)
    recipe = {"steps": [{"use": "magnitude", "sparsity": 0.75, "pattern": "4:16", "bits": 4, "group_size": 32}]}
    options = ["samples=1", "length=16", "save.format=packed"]
    lissom.compress(tmp_path / "dense", tmp_path / "out", recipe, overrides=options)
    assert "4:16 int4" in Engine(tmp_path / "out", threads=1).layers.forms.values()
    file = next((tmp_path / "out").glob("*.safetensors"))
    good = file.read_bytes()
    spoilt = bytearray(good)
    spoilt[-100] ^= 1
    for data, says in ((bytes(spoilt), "checksum|damaged"), (good[:-200], "truncated|damaged|cut")):
        file.write_bytes(data)
        with pytest.raises(LissomError, match=says):
            Engine(tmp_path / "out", threads=1)
    tensors, metadata = load_file(tmp_path / "out" / file.name, good)
    name = next(n for n in tensors if n.endswith(".index"))
    tensors[name] = torch.full_like(tensors[name], 255)  # ranks of 4 of 16: up to 1819 of 2047
    metadata.pop("sha256", None)
    save_file(tensors, file, metadata)
    with pytest.raises(LissomError, match=r"range|position"):
        Engine(tmp_path / "out", threads=1)


def load_file(path, data):
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
