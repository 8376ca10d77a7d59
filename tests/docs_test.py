"""README and the pages of docs/ build without warnings, and their links have targets."""

import functools
import re
import socket

import pytest
from mkdocs import config as mkdocs_config
from mkdocs.commands import build

from tests.source_code import REPOSITORY

README = REPOSITORY / "README.md"
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@functools.cache
def anchors(path: str) -> set[str]:
  """The anchors of a Markdown file's headings, as GitHub and MkDocs make them."""
  text = _CODE.sub("", (REPOSITORY / path).read_text())
  titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def test_docs_build_strictly_and_offline(tmp_path, monkeypatch):
  def refuse(self, address):
    raise AssertionError(f"the build of docs/ connects to {address}")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  site = tmp_path / "site"
  config = mkdocs_config.load_config(
    str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(site)
  )
  build.build(config)  # raises if anything warns
  pages = {page.stem for page in (REPOSITORY / "docs").glob("*.md")}
  assert pages <= {page.stem for page in site.glob("*.html")}
  text = (site / "quickstart.html").read_text()
  fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"(https?://[^\"]*)", text)
  assert not fetched, f"pages should fetch nothing: {fetched}"


def test_readme_is_short():
  assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("link", sorted(set(_LINK.findall(_CODE.sub("", README.read_text())))))
def test_links_of_readme_lead_somewhere(link):
  if link.startswith("https://"):
    return
  path, _, anchor = link.partition("#")
  path = path or README.name
  assert (REPOSITORY / path).exists(), f"README.md links to {path}, which does not exist"
  assert not anchor or anchor in anchors(path), f"{path} has no heading {anchor}"


def test_results_are_newest_first():
  text = (REPOSITORY / "docs/results.md").read_text()
  headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
  dates = [re.match(r"\d{4}-\d\d-\d\d: ", heading) for heading in headings]
  assert all(dates), f"each entry should begin with its date: {headings}"
  assert [date[0] for date in dates] == sorted((date[0] for date in dates), reverse=True)
