"""Every method has a page and a test, every page is reachable, every link leads somewhere, public names are pinned."""

import importlib.util
import re
from pathlib import Path

import pytest

import lissom
from lissom.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_that_says_how_to_run_it(name):
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"write {page}"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ") and name in text.splitlines()[0]
    missing = [s for s in METHODS[name].settings() if s not in text]
    assert not missing, f"{page.name} does not name the settings {missing}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_test_of_its_own_beside_the_contract(name):
    method = METHODS[name]
    folder = ROOT / "tests" / "methods" / method.family
    own = [
        *folder.glob("test_*.py"),
        ROOT / "tests" / "core" / "test_sweep.py",
        ROOT / "tests" / "pipeline" / "test_stream.py",
    ]
    words = {name, method.run.__name__, method.config.__name__}
    pattern = re.compile(r"\b(" + "|".join(re.escape(w) for w in words) + r")\b")
    assert any(pattern.search(f.read_text(encoding="utf-8")) for f in own), f"no file in {folder} tests {name}"


def test_links_of_the_docs_lead_somewhere(build):
    assert build.problems() == []


def test_the_site_is_written_with_links_between_its_pages(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path / "site")
    build.build()
    index = (tmp_path / "site" / "index.html").read_text()
    assert 'href="recipes.html"' in index and 'href="methods/sparsegpt.html"' in index and "<table>" in index
    assert ".md" not in re.sub(r"<code>.*?</code>", "", index)


def test_a_broken_link_is_found(build, tmp_path, monkeypatch):
    page = tmp_path / "index.md"
    page.write_text("[x](nowhere.md) `[y](code.md)`\n")
    monkeypatch.setattr(build, "DOCS", tmp_path)
    monkeypatch.setattr(build, "METHODS", {})
    assert build.problems() == ["index.md: the link nowhere.md leads nowhere"]


def test_links_of_the_pages_at_the_root_lead_somewhere(build):
    for page in ROOT.glob("*.md"):
        for link in build.links(page.read_text(encoding="utf-8")):
            target = link.split("#")[0]
            if target and not re.match(r"[a-z]+:", target):
                assert (ROOT / target).exists(), f"{page.name}: {link}"


def test_public_names():
    assert {
        "compress",
        "evaluate",
        "inspect",
        "load",
        "load_encoder",
        "open_model",
        "plan",
        "unpack",
        "write_report",
    } <= set(lissom.__all__)
    for name in lissom.__all__:
        assert getattr(lissom, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        lissom.nothing_like_this  # noqa: B018
