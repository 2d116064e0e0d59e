"""The site of documentation: it builds without a warning, and its links lead somewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "scripts" / "site"


@pytest.fixture
def public_names(monkeypatch):
    monkeypatch.syspath_prepend(str(SITE))
    import public_names

    return public_names


def test_every_public_name_has_a_docstring(public_names):
    assert public_names.undocumented() == []


def test_the_reference_names_what_the_package_exports(public_names):
    import dpo_keras
    import dpo_keras.losses
    import dpo_keras.training

    listed = public_names.public_names()
    assert set(listed["dpo_keras"]) == set(dpo_keras.__all__) - {"callbacks", "__version__"}
    assert set(listed["dpo_keras.losses"]) == set(dpo_keras.losses.__all__)
    assert set(listed["dpo_keras.training"]) == set(dpo_keras.training.__all__) - {"callbacks"}
    assert "RunLog" in listed["dpo_keras.callbacks"]


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        target = given.get("href") if tag in ("a", "link") else given.get("src")
        if target and ":" not in target and not target.startswith("//"):
            self.links.add(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "-f", str(SITE / "mkdocs.yml"), "-d", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


@pytest.mark.slow
def test_links_of_the_site_lead_to_pages_and_anchors(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(unquote(link))
            target = (path.parent / address).resolve() if address else path
            if not target.exists() or (target in pages and anchor not in pages[target].anchors):
                broken.append((str(path.relative_to(site)), link))
    assert [link for link in broken if not link[0].startswith("404")] == []


@pytest.mark.slow
def test_the_site_has_guides_examples_and_the_reference(site):
    api = (site / "api" / "dpo_keras.losses.html").read_text(encoding="utf-8")
    assert 'id="dpo_keras.losses.dpo_loss.DPOLoss"' in api
    assert "&gt;&gt;&gt;" in api, "examples are shown as code"
    for name in ("dpo_keras/losses/index", "scripts/examples/dpo_with_lora.py", ".github/LIMITS"):
        assert (site / f"{name}.html").is_file()
