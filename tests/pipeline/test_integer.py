"""The recipe `ibert` from the command's function to the file and back, and what judges encoders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cosine_similarity

import lissom
from lissom.core import CalibrationError, CheckpointError, FormatError, RecipeError
from lissom.evaluate import embeddings, pieces, similarity
from lissom.export import load_encoder
from lissom.methods.quantize.ibert_encoder import encode, float_encode
from lissom.models import Model, encoder_of, open_checkpoint

SMALL = ["samples=8", "length=24"]


@pytest.fixture(scope="module")
def made(random_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("integer") / "out"
    return out, lissom.compress(random_checkpoint("bert"), out, "ibert", overrides=SMALL)


def test_the_record_is_the_transformers_model(random_checkpoint):
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(random_checkpoint("bert")).eval()
    ids, keep = torch.randint(2, 320, (3, 17)), torch.ones(3, 17, dtype=torch.bool)
    keep[1, 9:] = False
    with torch.no_grad():
        h = theirs(input_ids=ids, attention_mask=keep.long()).last_hidden_state
    want = (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    got = float_encode(encoder_of(Model(open_checkpoint(random_checkpoint("bert")))), ids, keep)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_file_holds_integers_only_and_gives_the_same_ones(made, random_checkpoint):
    out, result = made
    with safe_open(out / "model.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds <= {torch.int8, torch.int16, torch.int32, torch.int64}
    assert "none of them floats" in result["verified"]["integers"] and (out / "report.html").exists() is False
    loaded = load_encoder(out)
    ids, keep = torch.randint(2, 320, (4, 20)), torch.ones(4, 20, dtype=torch.bool)
    keep[2, 7:] = False
    codes = encode(loaded.encoder, ids, keep)
    assert not codes.is_floating_point()
    want = float_encode(encoder_of(Model(open_checkpoint(random_checkpoint("bert")))), ids, keep)
    assert float(cosine_similarity(codes.float(), want).min()) > 0.97
    assert torch.equal(loaded.embed(ids, keep), torch.nn.functional.normalize(codes.double(), dim=1).float())
    linear = sum(layer["weights"] for layer in result["layers"])
    assert sum(layer["bytes"] for layer in result["layers"]) == linear  # one byte a weight


def test_the_same_run_gives_the_same_bytes(made, random_checkpoint, tmp_path):
    lissom.compress(random_checkpoint("bert"), tmp_path / "again", "ibert", overrides=SMALL)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()


def test_similarities_by_hand(made, random_checkpoint, tmp_path):
    out, dense = made[0], random_checkpoint("bert")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again and again. " * 20)
    found = similarity(out, dense, str(text), 12, 5)
    tokenizer = open_checkpoint(dense).tokenizer()
    rows = torch.tensor(tokenizer(text.read_text())["input_ids"])[:60].reshape(5, 12)
    ids = pieces(tokenizer, rows)
    a, b = embeddings(dense, ids), embeddings(out, ids)
    cosines = [float(a[i] @ b[i]) for i in range(5)]
    moved = [abs(float(a[i] @ a[j]) - float(b[i] @ b[j])) for i in range(5) for j in range(i)]
    assert found["cosine"] == pytest.approx(sum(cosines) / 5, abs=1e-6)
    assert found["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert found["similarity_error"] == pytest.approx(sum(moved) / 10, abs=1e-6)
    assert found["similarity_error_max"] == pytest.approx(max(moved), abs=1e-6)
    assert found["bytes"] == (out / "model.safetensors").stat().st_size
    assert similarity(dense, dense, str(text), 12, 5)["cosine_min"] == pytest.approx(1, abs=1e-6)


def test_pieces_stand_between_the_first_and_the_last_token():
    class Tokenizer:
        cls_token_id, sep_token_id = 101, 102

    assert pieces(Tokenizer(), torch.tensor([[5, 6]])).tolist() == [[101, 5, 6, 102]]


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        ("llama", "ibert", "not a BERT encoder"),
        ("bert", {"steps": [{"use": "ibert"}]}, "format integer belongs to ibert"),
        (
            "bert",
            {"steps": [{"use": "rtn", "bits": 4}], "save": {"format": "integer"}},
            "format integer belongs to ibert",
        ),
        ("bert", {"steps": [{"use": "ibert"}, {"use": "rtn", "bits": 4}], "save": {"format": "integer"}}, "take out"),
        (
            "bert",
            {"steps": [{"use": "ibert", "alpha": 2}], "save": {"format": "integer"}},
            r"alpha must be in \[0, 1\]",
        ),
        (
            "bert",
            {"steps": [{"use": "ibert"}], "save": {"format": "integer"}, "calibration": {"length": 400}},
            "longer",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(kind, recipe, message, random_checkpoint, tmp_path):
    for run in (
        lambda: lissom.plan(random_checkpoint(kind), recipe),
        lambda: lissom.compress(random_checkpoint(kind), tmp_path / "o", recipe),
    ):
        with pytest.raises(RecipeError, match=message):
            run()
    assert not list(tmp_path.iterdir())


def test_damaged_and_wrong_directories_are_named(made, random_checkpoint, tmp_path):
    out = made[0]
    with pytest.raises(CheckpointError, match="encoder in integers"):
        lissom.open_model(out)
    with pytest.raises(FormatError, match="holds no encoder in integers"):
        load_encoder(random_checkpoint("bert"))
    with pytest.raises(CalibrationError, match="--against"):
        similarity(out, None, "builtin-heldout", 16, 4)
    broken = tmp_path / "broken"
    broken.mkdir()
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (broken / "model.safetensors").write_bytes(raw)
    config = json.loads((out / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="checksum"):
        load_encoder(broken)
    (broken / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    del config["quantization_config"]["tree"]["heads"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="is damaged"):
        load_encoder(broken)


@pytest.mark.parametrize(
    "step",
    [
        {"use": "gobo", "bits": 3},
        {"use": "vs-quant", "bits": 4, "group_size": 16},
        {"use": "gptq", "bits": 4, "group_size": 16},
    ],
)
def test_encoders_take_weight_only_methods_too(step, random_checkpoint, tmp_path):
    recipe = {"steps": [step], "save": {"format": "packed"}}
    lissom.compress(random_checkpoint("bert"), tmp_path / "out", recipe, overrides=["samples=2", "length=24"])
    found = similarity(tmp_path / "out", random_checkpoint("bert"), "builtin-heldout", 16, 6)
    assert 0.5 < found["cosine_min"] <= found["cosine"] < 1 - 1e-6
