"""Images: the same model from a mapped file, without torch; damage and old files are noticed."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from lissom.core import FormatError
from lissom.kernels import extension, isa
from lissom.run.engine import Engine
from lissom.run.generation import generate
from lissom.run.image import read_image, write_image
from lissom.run.load import load
from lissom.run.parts import Recorded
from lissom.run.rounding import rounding
from lissom.run.start import open_parts, open_runner
from lissom.run.tokenizer import Tokenizer, describe
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(isa() == "torch", reason="needs the C++ extension")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{{ bos_token }}<{{ m.role }}>{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "images"))
    return tmp_path / "images"


def test_a_mapped_model_is_the_same(tmp_path, monkeypatch):
    tiny_model("qwen2", tmp_path, use_sliding_window=False, hidden_size=64)
    for name in ("int4", "4:16 int4", None):
        parts = load(tmp_path, rounding(name) if name else None)
        parts.recorded = Recorded([[(8, 0.0), (0, 0.0), (4, 0.5), (8, 0.25)]] * len(parts.blocks), 8, "")
        assert write_image(parts, tmp_path / "x.image")
        mapped = read_image(tmp_path / "x.image")
        assert mapped.layers == parts.layers and mapped.sizes == parts.sizes and mapped.ends() == parts.ends()
        assert mapped.recorded == parts.recorded
        ids = np.arange(5, 40)
        monkeypatch.setenv("LISSOM_MAP", "1")
        truly = read_image(tmp_path / "x.image")
        monkeypatch.delenv("LISSOM_MAP")
        a, b, c = (Engine(p, context=64, threads=1).step(ids, want="all") for p in (parts, mapped, truly))
        assert np.array_equal(a, b) and np.array_equal(a, c)


def four_bits(weight):
    """Codes of ``weight`` around 8, those far out cut off."""
    import torch

    from lissom.run.load import rounded

    codes = rounded(weight)
    codes.values.clamp_(121, 135).sub_(120)
    return type(codes)(codes.values, codes.scale, torch.full_like(codes.zero, 8.0), 4, codes.group_size)


def test_spill_lists_and_binary_weights_are_mapped_too():
    import torch

    from lissom.kernels import Form, Packed, PackedBinary

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 128, generator=g)
    codes = four_bits(weight)
    matrix = Packed(codes, torch.rand(40, 128, generator=g) < 0.3, Form("n:16 int4", 4, True)).matrix
    assert matrix.spilled
    x = torch.randn(3, 128, generator=g).numpy()
    binary = PackedBinary(weight[None] > 0, torch.ones(1, 40, 4), torch.zeros(40, 4), 32).matrix
    for made, kind in ((matrix, extension.Matrix), (binary, extension.Bcq)):
        data = np.array(made.data)
        again = kind.borrow(*made.parts, data)
        assert again.bytes == made.bytes
        y, z = np.empty((3, 40), np.float32), np.empty((3, 40), np.float32)
        made.linear(x, y)
        again.linear(x, z)
        assert np.array_equal(y, z)
        with pytest.raises(ValueError, match="cut short"):
            kind.borrow(*made.parts, data[:-1])
    with pytest.raises(ValueError, match="out of range"):
        spoilt = np.array(matrix.data)
        first = matrix.parts[3] // 16 * 64 + 32  # the count of the first tile's list, then its first entry
        spoilt[first + 2 : first + 4] = 255
        extension.Matrix.borrow(*matrix.parts, spoilt)
    with pytest.raises(ValueError, match="no such kind"):
        extension.Matrix.borrow(77, *matrix.parts[1:-1], 0, np.array(matrix.data))


def test_strips_with_slots_of_their_own_are_mapped_and_checked():
    import torch

    from lissom.kernels import Form, Packed

    g = torch.Generator().manual_seed(0)
    codes = four_bits(torch.randn(40, 128, generator=g))
    mask = torch.rand(40, 8, 16, generator=g).argsort(2) < torch.arange(40)[:, None, None] % 9
    matrix = Packed(codes, mask.reshape(40, 128), Form("n:16 int4")).matrix
    data = np.array(matrix.data)
    y, z = np.empty((3, 40), np.float32), np.empty((3, 40), np.float32)
    x = torch.randn(3, 128, generator=g).numpy()
    matrix.linear(x, y)
    again = extension.Matrix.borrow(*matrix.parts, data)
    again.linear(x, z)
    assert np.array_equal(y, z) and again.bytes == matrix.bytes
    with pytest.raises(ValueError, match="cut short"):
        extension.Matrix.borrow(*matrix.parts, data[:-1])
    for at, value, words in [(0, 3, "slots"), (2, 18, "slots"), (1, 0, "slots"), (64, 40, "order"), (67, 255, "order")]:
        spoilt = data.copy()
        spoilt[at] = value
        with pytest.raises(ValueError, match=words):
            extension.Matrix.borrow(*matrix.parts, spoilt)
    spoilt = data.copy()
    spoilt[64:68] = spoilt[68:72]  # one row twice
    with pytest.raises(ValueError, match="order"):
        extension.Matrix.borrow(*matrix.parts, spoilt)


@pytest.mark.parametrize("damage", ["cut", "header", "magic", "empty"])
def test_damaged_images_are_refused_and_made_again(damage, llama, cache):
    expected = generate(open_runner(str(llama), context=64), "class", max_tokens=5)
    (image,) = cache.glob("*.image")
    data = bytearray(image.read_bytes())
    data = {"cut": data[:-200], "header": data[:50] + b"#" + data[51:], "magic": b"x" + data[1:], "empty": b""}[damage]
    image.write_bytes(data)
    with pytest.raises(FormatError, match="no image that this lissom can map"):
        read_image(image)
    assert generate(open_runner(str(llama), context=64), "class", max_tokens=5) == expected
    read_image(image)


def test_a_full_disk_costs_the_image_only(llama, cache, monkeypatch):
    expected = generate(open_runner(str(llama), context=64), "class", max_tokens=5)
    for file in cache.iterdir():
        file.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lissom.run.image._fill", full)
    assert generate(open_runner(str(llama), context=64), "class", max_tokens=5) == expected
    assert not list(cache.iterdir())


def test_the_slow_start_is_told(llama, cache):
    calls = []
    open_parts(str(llama), tick=lambda done, total: calls.append((done, total)))
    total = calls[-1][1]
    assert calls[0] == (0, 0) and sorted(calls[1:]) == [(i, total) for i in range(1, total + 1)]
    calls.clear()
    open_parts(str(llama), tick=lambda done, total: calls.append((done, total)))
    assert not calls  # mapped


def test_changed_checkpoints_and_settings_have_their_own_image(llama, cache):
    for settings in ({}, {"rounded": "int4"}, {"outer_bits": 6}, {}):
        open_parts(str(llama), **settings)
    assert len(list(cache.glob("*.image"))) == 3
    (llama / "report.html").write_text("later")
    open_parts(str(llama))
    assert len(list(cache.glob("*.image"))) == 3
    file = llama / "model.safetensors"
    os.utime(file, ns=(1, 1))
    open_parts(str(llama))
    assert len(list(cache.glob("*.image"))) == 4


def test_the_cache_has_a_limit_and_can_be_off(llama, cache, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE_GB", "0.017")
    open_parts(str(llama))
    first = list(cache.glob("*.image"))
    os.utime(first[0], (1, 1))
    first[0].write_bytes(bytes(10**6))
    open_parts(str(llama), outer_bits=6)
    assert not first[0].exists() and len(list(cache.glob("*.image"))) == 1
    monkeypatch.setenv("LISSOM_CACHE", "off")
    assert open_parts(str(llama)).model is not None


def test_a_start_from_an_image_needs_no_torch(llama, cache):
    runner = open_runner(str(llama), context=64)
    expected = generate(runner, "class", max_tokens=8).text
    code = (
        "import sys; from lissom.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "generate", str(llama), "class", "-n", "8", "--context", "64"],
        capture_output=True, text=True, check=True, env={**os.environ, "LISSOM_CACHE": str(cache)},
    ).stdout  # fmt: skip
    assert out == f"{expected}\n[]\n"


def test_the_light_tokenizer_equals_that_of_transformers():
    theirs = tiny_tokenizer()
    theirs.chat_template = TEMPLATE
    try:
        mine = Tokenizer(*describe(theirs))
        messages = [{"role": "user", "content": " A class? "}, {"role": "assistant", "content": "Yes"}]
        text = mine.apply_chat_template(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<s><user>A class?<s><assistant>Yes<assistant>"
        assert mine.encode(text) == theirs.encode(text) and mine.eos_token_id == theirs.eos_token_id
        with pytest.raises(Exception, match="no"):
            mine.apply_chat_template([{"role": "bad", "content": ""}])
        theirs.chat_template = "{{ messages.__class__.__mro__ }}"  # a sandbox is a sandbox
        with pytest.raises(Exception, match="unsafe"):
            Tokenizer(*describe(theirs)).apply_chat_template(messages)
    finally:
        theirs.chat_template = None


def test_tokenizers_that_differ_are_not_replaced():
    theirs = tiny_tokenizer()

    class Other:
        def __getattr__(self, name):
            return getattr(theirs, name)

        def encode(self, text, **options):
            return [*theirs.encode(text, **options), 7]

    assert describe(Other()) is None
