"""The report: one file that needs nothing else, with the numbers of the manifest and the evaluations."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

import lissom
from lissom.core import OutputError
from lissom.report import remember, write_report


@pytest.fixture(scope="module")
def out(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    lissom.compress(
        trained, folder, "aggressive", overrides=["samples=4", "length=32", "group_size=32", "token_fisher=0.5"],
        command="lissom compress trained out --recipe aggressive",
    )  # fmt: skip
    remember(folder, lissom.evaluate(folder, "builtin", 32, 2, against=trained))
    write_report(folder)
    return folder


class Page(HTMLParser):
    """Tags that are open at the end, links to elsewhere, and the visible text."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.images = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [
            v for k, v in attrs if k in ("href", "src", "action", "data") and not v.startswith(("data:", "#"))
        ]
        self.images += [values] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture
def page(out):
    return Page((out / "report.html").read_text())


def test_it_is_whole_and_needs_nothing_from_elsewhere(out, page):
    assert page.open == [] and page.links == []
    raw = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (out / "report.html").read_text())
    assert not re.search(r"https?://|@import|url\(", raw)
    assert len(page.images) >= 3 and all(i["alt"] for i in page.images)
    for image in page.images:
        assert base64.b64decode(image["src"].split(",")[1])[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_has_the_numbers(out, page):
    manifest = json.loads((out / "manifest.json").read_text())
    (evaluation,) = json.loads((out / "evaluations.json").read_text())
    text = " ".join(page.text.split())
    for number in (
        f"{manifest['bits_per_weight']:.2f}",
        f"{100 * manifest['sparsity']:.1f}%",
        f"{manifest['dense_bytes'] / manifest['bytes']:.1f}×",
        f"{evaluation['perplexity']:.2f}",
        f"{evaluation['dense_perplexity']:.2f}",
        f"{evaluation['kl']:.3f}",
        f"{100 * evaluation['top1_agreement']:.1f}%",
        manifest["calibration"]["hash"],
        "lissom compress trained out --recipe aggressive",
        "28 of 28",
        "0.25 of what the layers before have lost is made up for",
        "to the 0.5",
    ):
        assert number in text, number
    for role in ("q", "o", "gate", "down"):
        assert role in text


def test_pictures_lie_beside_it(out):
    pictures = sorted(p.name for p in out.glob("*.png"))
    assert pictures == ["report-blocks.png", "report-bytes.png", "report-layers.png"]


def test_an_evaluation_on_the_same_windows_replaces_the_old(out, tmp_path):
    (tmp_path / "evaluations.json").write_text("[]")
    first = {"data": "a", "length": 8, "windows": 2, "perplexity": 1.0}
    remember(tmp_path, first)
    remember(tmp_path, first | {"perplexity": 2.0})
    remember(tmp_path, first | {"data": "b"})
    known = json.loads((tmp_path / "evaluations.json").read_text())
    assert [(k["data"], k["perplexity"]) for k in known] == [("a", 2.0), ("b", 1.0)]


def test_names_cannot_put_html_into_the_page(out, tmp_path):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"source": "<script>alert(1)</script>", "command": "</pre><b>x"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = write_report(tmp_path).read_text()
    assert "<script>" not in text and "</pre><b>" not in text


def test_what_is_missing_is_said(tmp_path, out):
    with pytest.raises(OutputError, match="no manifest"):
        write_report(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "manifest.json").write_text((out / "manifest.json").read_text())
    assert "Not measured yet" in write_report(tmp_path).read_text()
