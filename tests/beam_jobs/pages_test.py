"""beam_jobs/pages.py and outlines.py: the text of HTML and Markdown by section."""

import bz2
import gzip
import lzma
import time

import pytest

from beam_jobs import corpus, outlines, pages, sources

PAGE = """<!DOCTYPE html>
<html>
<head>
  <meta charset="iso-8859-1">
  <title>Grey Mill | The mills of \u015alusarz\u0142</title>
  <style>p { color: red }</style>
</head>
<body>
  <nav><ul><li><a href="/">Home</a></li></ul></nav>
  <div role="search">Find a mill</div>
  <p>The <b>Grey</b>
    Mill is old &amp; grey.</p>
  <h1>Grey Mill<a class="headerlink" href="#x">\u00b6</a></h1>
  <p>It turns.<br>It grinds.<img alt="A picture">
  <h2>History <span aria-hidden="true">#</span></h2>
  <h3>Early <i>years</i></h3>
  <ul><li>Built in 1712.<li>By Ada.</ul>
  <h3>Late years</h3>
  <pre>if mill:
    grind()</pre>
  <h2>Size</h2>
  <table>
    <tr><th>Part<th>Height</tr>
    <tr><td><p>Tower</p></td><td>12 m</td></tr>
  </table>
  <script>if (a < b) { document.write("<p>no</p>") }</script>
  <noscript>Switch on programs</noscript>
  <p hidden>Nobody sees this.</p>
  <footer>Imprint</footer>
</body>
</html>
"""
PAGE_SECTIONS = [
  ("Grey Mill | The mills of \u015alusarz\u0142", "The Grey Mill is old & grey."),
  ("Grey Mill | The mills of \u015alusarz\u0142", "It turns.\nIt grinds."),
  (
    "Grey Mill | The mills of \u015alusarz\u0142 > History > Early years",
    "Built in 1712.\nBy Ada.",
  ),
  (
    "Grey Mill | The mills of \u015alusarz\u0142 > History > Late years",
    "if mill:\n    grind()",
  ),
  ("Grey Mill | The mills of \u015alusarz\u0142 > Size", "Part | Height\nTower | 12 m"),
]


def read(path) -> list[corpus.Article]:
  chunks = sources.split_into_chunks(sources.find_sources(str(path), format="auto"))
  return [article for chunk in chunks for article in corpus.Articles(chunk)]


def sections(path) -> list[tuple[str, str]]:
  got = read(path)
  assert [article.line for article in got] == list(range(1, len(got) + 1))
  return [(article.title, article.text) for article in got]


def written(path, text: str):
  path.write_text(text, encoding="utf-8")
  return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_html_in_any_encoding_and_packing(encoding, pack, tmp_path):
  """What the page says about its encoding does not matter."""
  (tmp_path / "page").write_bytes(pack(PAGE.encode(encoding)))
  assert sections(tmp_path) == PAGE_SECTIONS


TITLES = {
  "<title>Docs</title><h1>Mill</h1>It is.": "Docs > Mill",
  "<title>Mill</title><h1>MILL</h1>It is.": "Mill",
  "<title>Mill - Docs</title><h1>Mill</h1>It is.": "Mill - Docs",
  "<title>Docs: Mill</title><h1>Mill</h1><h3>Size</h3>It is.": "Docs: Mill > Size",
  "<title> </title><h1>Mill</h1>It is.": "Mill",
  "<h1> <img> </h1><h2>Size</h2>It is.": "the name > Size",
  "<h2>Size</h2><h1>Mill</h1>It is.": "Mill",
  "It is.": "the name",
  "<svg><title>Icon</title></svg>It is.": "the name",
  "<h1>" + "long " * 100 + "</h1>It is.": "the name",
  "<h1>Mill<p>It is.": "Mill",
}


@pytest.mark.parametrize("text", TITLES)
def test_titles_of_html(text, tmp_path):
  *_, (title, body) = sections(written(tmp_path / "the  name.html", text))
  assert title == TITLES[text] and "It is." in body


def test_a_heading_without_text_is_counted_unless_it_has_sections(tmp_path):
  path = written(tmp_path / "a.html", "<h1>A</h1><h2>B</h2><h3>C</h3><h2>D</h2>x<h2>E</h2>")
  assert sections(path) == [("A > B > C", ""), ("A > D", "x"), ("A > E", "")]
  with pytest.raises(corpus.Rejected, match="empty"):
    corpus.sentences_of(read(path)[0])
  for text in ("", " \n", "<nav>x</nav>", "<!-- x -->", "<title>x</title>"):
    assert [body for _, body in sections(written(path, text + " "))] == [""], text


def test_html_that_nobody_would_write(tmp_path):
  """Nothing is lost but what a browser hides, and time grows with the page alone."""
  pages_ = {
    "deep": "<div>" * 1900 + "Deep. " + "</div>" * 1900 + "After.",
    "deep in bold": "<b>" * 1900 + "Deep. After.",
    "table in table": "<table><tr><td>" * 600 + "Deep. " + "</table>" * 600 + "After.",
    "hidden": "<p hidden>" + "<div>" * 1900 + "</div>" * 1900 + "</p>Deep. After.",
    "comment": f"Deep. <!-- {'x' * 11_000_000} -->After.",
    "brackets": "Deep. " + "<" * 500_000 + " After.",
    "ends": "Deep. " + "</div>" * 200_000 + "After.",
    "attributes": f"Deep. <p {' '.join(f'a{n}=1' for n in range(100_000))}>After.",
    "characters": "Deep. &#0; &#xD800; &#x110000; &nothing; After.",
  }
  for name, text in pages_.items():
    started = time.process_time()
    ((_, body),) = sections(written(tmp_path / "a.html", text))
    took = time.process_time() - started
    assert body.startswith("Deep.") and body.endswith("After."), (name, body[:99], body[-99:])
    assert took < 5, f"{name} took {took:.1f} s"


UNCLOSED = {
  "<nav>Menu. <p>Text.": "<nav> is never closed: 11 characters",
  "<nav>Menu. <p>Text.</body></html><!-- made by x -->": "<nav> is never closed: 11 characters",
  "<div hidden>Menu. <p>Text.</body>": "<div> is never closed: 11 characters",
  "<p hidden>Text.": None,
  "<button>Text.": "<button> is never closed: 5 characters",
  "<script>f();<p>Text.": "<script> is never closed: 12 characters",
  "<script>f()</script><noscript>Text.": "<noscript> is never closed: 5 characters",
  "<footer>Old.</footer><!-- Text.": "a comment is never closed: 6 characters",
  "<footer>Old.</footer><a href='x>Text.": "a tag is never closed: what follows",
  "<footer>Text.</footer></body></html><!-- made by x -->\n": None,
  "<div><nav>Menu.</div>": None,
  "<nav><nav>Menu.</nav>": "<nav> is never closed: 5 characters",
  "</body></html><script>x</script>": None,
}


@pytest.mark.parametrize("text", UNCLOSED)
@pytest.mark.parametrize("name", ["a.html", "a.md"])
def test_what_hides_the_rest_of_a_page_is_named(name, text, tmp_path):
  """The text before it is read, and what a browser hides by a whole element is no fault."""
  first, *rejected = read(written(tmp_path / name, f"<div>It is.</div>{text}"))
  assert first.text == "It is."
  wanted = UNCLOSED[text]
  assert [(article.reason, article.why) for article in rejected] == (
    [("unclosed_element", f"{wanted}, up to the end of the page, cannot be read")] if wanted else []
  )


def test_an_unclosed_title_is_named(tmp_path):
  first, rejected = read(written(tmp_path / "a.html", "<title>Mill <p>It is."))
  assert (first.title, first.text) == ("Mill <p>It is.", "")
  assert rejected.reason == "unclosed_element" and rejected.why.startswith("<title> is never")
  for tag in ("plaintext", "xmp"):  # their text is kept
    (only,) = read(written(tmp_path / "a.html", f"<p>It is.</p><{tag}>It turns."))
    assert only.text.endswith("It turns."), tag


CHARSETS = {
  "iso-8859-1": ("cp1252", "It turns \u2013 in M\xfchlau."),
  "windows-1251": ("cp1251", "\u041c\u0435\u043b\u044c\u043d\u0438\u0446\u0430."),
  "koi8-r": ("koi8-r", "\u041c\u0435\u043b\u044c\u043d\u0438\u0446\u0430."),
  "Shift_JIS": ("cp932", "\u6c34\u8eca\u3002"),
  "x-euc-jp": ("euc-jp", "\u6c34\u8eca\u3002"),
  "gb2312": ("gb18030", "\u6c34\u8f66\u3002"),
  "euc-kr": ("cp949", "\ubb3c\ub808\ubc29\uc544."),
}


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize(
  "declaration",
  [
    "<meta charset={}>",
    '<META name=x content=y><meta http-equiv="Content-Type" content="text/html; charset={}">',
    '<?xml version="1.0" encoding="{}"?>',
  ],
)
def test_html_in_the_charset_that_it_declares(charset, declaration, tmp_path):
  encoding, text = CHARSETS[charset]
  page = declaration.format(charset) + f"<html><title>A</title><p>{text}"
  (tmp_path / "a.html").write_bytes(page.encode(encoding))
  assert sections(tmp_path / "a.html") == [("A", text)]


@pytest.mark.parametrize(
  "charset", ["utf-8", "euc-jp", "rot13", "base64", "utf-7", "no-such", "idna"]
)
def test_a_wrong_charset_is_named(charset, tmp_path):
  (tmp_path / "a.html").write_bytes(f"<meta charset={charset}>M\xfchle".encode("cp1252"))
  (article,) = read(tmp_path / "a.html")
  assert article.reason == "bad_utf8"
  at = article.why.partition(" is not")[0]
  assert article.why == (
    f"{at} is not UTF-8; save it in UTF-8, or declare the right charset: it is not {charset}"
  )


def test_html_nested_too_deep_is_rejected_in_time(tmp_path):
  for tags in ("<div>", "<b>", "<table><tr><td>", "<ul><li>", "<nav>", "<svg>"):
    text = "Text. " + tags * (2_000_000 // len(tags)) + "</table>" * 100_000 + "After."
    started = time.process_time()
    (article,) = read(written(tmp_path / "a.html", text))
    took = time.process_time() - started
    assert article.reason == "too_deep", tags
    assert article.why == "elements are nested over 2,000 levels deep"
    assert took < 5, f"{tags} took {took:.1f} s"


def test_many_headings_are_sections(tmp_path):
  text = "".join(f"<h{1 + n % 6}>H{n}</h{1 + n % 6}>t{n}" for n in range(6000))
  got = sections(written(tmp_path / "a.html", text))
  assert len(got) == 6000 and got[-1][1] == "t5999"
  assert got[-1][0] == "H0 > H5994 > H5995 > H5996 > H5997 > H5998 > H5999"


# ---------------------------------------------------------------------------------------- Markdown

MARKDOWN = """---
title: "The \\"Grey\\" Mill"
tags: [mills]
---
It *is* a [mill](http://x.org) with
a soft break, `code`, <your-name>, List<T>, and the <title> and <script> tags.

# The Tower

> It is quoted.

```sh
# no heading
make mill
```

| Part  | Height |
|-------|-------:|
| Tower | 12 m   |

Old style
---------

1. One.
2. Two.
   - Three.

<details><summary>More</summary>
<p>It is <b>raw</b>.
</details>

<!-- a note -->
<script>alert(1)</script>

### Deeper ###

It ends.\u2028Truly.
"""
MARKDOWN_SECTIONS = [
  (
    'The "Grey" Mill',
    "It is a mill with a soft break, code, <your-name>, List<T>, and the <title> and <script>"
    " tags.",
  ),
  (
    'The "Grey" Mill > The Tower',
    "It is quoted.\n# no heading\nmake mill\nPart | Height\nTower | 12 m",
  ),
  ('The "Grey" Mill > The Tower > Old style', "One.\nTwo.\nThree.\nMore\nIt is raw."),
  ('The "Grey" Mill > The Tower > Old style > Deeper', "It ends. Truly."),
]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_markdown(encoding, line_end, tmp_path):
  (tmp_path / "a.md").write_bytes(MARKDOWN.replace("\n", line_end).encode(encoding))
  assert sections(tmp_path) == MARKDOWN_SECTIONS


FRONT_MATTER = {
  "---\ntitle: Mill\n---\n": "Mill",
  "---\ndate: 1\ntitle: 'Ada''s mill'\n---\n": "Ada's mill",
  '+++\ntitle = "Mill"\n+++\n': "Mill",
  '---\ntitle: "Mill\n---\n': "Mill",
  "---\ntitle: >\n  Mill\n---\n": "name",
  "---\nnested:\n  title: x\n---\n": "name",
  f"---\ntitle: {'x' * 301}\n---\n": "name",
  "---\n---\n": "name",
  "---\ntitle: Mill\n---\n# Mill\n": "Mill",
  "---\ntitle: Docs\n---\n# Mill\n": "Docs > Mill",
  "---\ntitle: [1]\n---\n": "[1]",
}


@pytest.mark.parametrize("settings", FRONT_MATTER)
def test_titles_of_markdown(settings, tmp_path):
  assert sections(written(tmp_path / "name.md", settings + "It is.")) == [
    (FRONT_MATTER[settings], "It is.")
  ]


def test_a_rule_is_no_front_matter(tmp_path):
  path = written(tmp_path / "name.md", "---\n\nIt is.\n\ntitle: It stays.\n")
  assert sections(path) == [("name", "It is.\ntitle: It stays.")]


def test_markdown_nested_too_deep_is_rejected_not_cut(tmp_path):
  """Its parser would pass over the inside."""
  for levels in (10, 23):
    lines = "".join("  " * level + f"- Level {level}.\n" for level in range(levels))
    ((_, body),) = sections(written(tmp_path / "a.md", lines))
    assert body.splitlines() == [f"Level {level}." for level in range(levels)]
  for mark in ("> ", "- ", "1. ", "> - "):
    for times in range(14, 60):
      (article,) = read(written(tmp_path / "a.md", mark * times + "Inside.\n"))
      assert article.reason == "too_deep" or "Inside." in article.text, mark * times
  assert article.why == "quotes or lists are nested too deep (24 lists, 48 quotes)"


UNITS = ["[", "![", "*a **a ", "`a``b```c", "<!--", "<a b='c' ", "_*", "~~a", "[a](", "a|b\n-|-\n"]


@pytest.mark.parametrize("unit", UNITS)
def test_time_grows_with_markdown_not_with_its_square(unit, tmp_path):
  def secs(num_chars: int) -> float:
    path = written(tmp_path / "a.md", unit * (num_chars // len(unit)) + "\n\nEnd.")
    started = time.process_time()
    assert [title for title, _ in sections(path)] == (["a", ""] if unit == "<!--" else ["a"])
    return time.process_time() - started

  secs(1000)
  short, long = secs(5000), secs(20_000)
  assert long < 4 * 2.5 * max(short, 0.01), f"{short:.2f} s, four times as long: {long:.2f} s"


def test_large_markdown_is_parsed_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(pages, "_MAX_MARKDOWN_CHARS", 100)
  text = "".join(f"# Mill {n}\n\nMill {n} is *here*.\n\nIt turns.\n\n" for n in range(50))
  got = sections(written(tmp_path / "a.md", text))
  assert got == [
    ("Mill 0" if n == 0 else f"Mill 0 > Mill {n}", f"Mill {n} is here.\nIt turns.")
    for n in range(50)
  ]
  for mark in (" ", "\n", "\n\n"):
    words = [f"w{n}" for n in range(300)]
    ((_, body),) = sections(written(tmp_path / "a.md", mark.join(words)))
    assert "".join(body.split()) == "".join(words), "no letter is lost"


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["a.html", "a.md"])
def test_pages_that_cannot_be_read_are_named(name, tmp_path, monkeypatch):
  monkeypatch.setattr(pages, "_MAX_PAGE_BYTES", 100_000)
  faults = {
    b"The M\xfchle.": ("bad_utf8", "byte 5 is not UTF-8; save it in UTF-8"),
    b"x" * 100_001: ("too_long", "the file is longer than 100,000 bytes; split it"),
    b"x" * 70_000 + b"\0": ("binary_file", "it has zero bytes or control characters"),
  }
  for data, wanted in faults.items():
    (tmp_path / name).write_bytes(data)
    (article,) = read(tmp_path / name)
    assert (article.reason, article.why) == wanted
  (tmp_path / name).write_bytes(gzip.compress(PAGE.encode())[:-20])
  assert [article.reason for article in read(tmp_path / name)] == ["truncated_gzip"]


def test_sections_of_a_long_page_come_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr("beam_jobs.documents.MAX_ARTICLE_BYTES", 1000)
  text = "<p>" + " ".join(f"Sentence {n} is here." for n in range(100)) + "<h2>Last</h2>End."
  got = read(written(tmp_path / "a.html", text))
  assert [article.part for article in got] == [0, 1, 2, 0]
  assert [article.title for article in got] == ["a", "a", "a", "a > Last"]


def test_blocks_end_the_lines_around_them():
  for tag in ("section", "figcaption", "summary", "dd", "caption", "legend"):
    outline = outlines.Outline()
    outline.data("a")
    outline.start(tag, {})
    outline.data("b")
    outline.end(tag)
    outline.data("c")
    assert outline.close().sections == [outlines.Section(0, "", "a\nb\nc")], tag
