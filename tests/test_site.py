"""Links of the notebooks; and, where `make docs` has built the site, its pages as a reader without a network sees
them."""

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_docs" / "html"
PAGES = sorted(SITE.rglob("*.html"))
built = pytest.mark.skipif(not PAGES, reason="no site; make docs builds it")


def written(path):
    """The text of a Markdown file or of a notebook's Markdown cells, without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def links(path):
    return [
        unquote(link.partition("#")[0])
        for link in re.findall(r"\]\(<?([^)\s>]+)", written(path))
        if not urlsplit(link).scheme and link.partition("#")[0]
    ]


def test_links_of_notebooks_and_reports_lead_to_files():
    sources = [
        ROOT / "README.md",
        *(
            path
            for folder in ("nbs", "reports")
            for kind in ("*.ipynb", "*.md")
            for path in (ROOT / folder).rglob(kind)
            if ".ipynb_checkpoints" not in path.parts and path.name != "contents.md"
        ),
    ]
    lost = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in sources
        for link in links(path)
        if not (path.parent / link).exists()
    ]
    assert len(sources) > 40 and lost == []


def test_the_tour_leads_to_every_notebook():
    tour = [(ROOT / "nbs" / link).resolve() for link in links(ROOT / "nbs" / "tour.ipynb")]
    there = [
        *(path for path in (ROOT / "nbs").rglob("[0-9]*.ipynb") if path.parent.name != "pipeline"),
        *(ROOT / "nbs" / "bench").glob("*.ipynb"),
        *(ROOT / "reports" / "notebooks").glob("*.ipynb"),
    ]
    assert len(there) > 60
    assert {path.name for path in there if path not in tour} == set(), "say in nbs/tour.ipynb what it is for"


def test_no_text_of_a_notebook_is_commented_out():
    text = {
        f"{path.relative_to(ROOT)}, cell {number}": "".join(cell["source"])
        for folder in ("nbs", "reports/notebooks")
        for path in (ROOT / folder).rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"])
        if cell["cell_type"] == "markdown"
    }
    assert [place for place, words in text.items() if re.search(r"^# #|^#$", words, flags=re.M)] == []


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loads.append(attributes["href"])
        elif tag != "a" and "src" in attributes:
            self.loads.append(attributes["src"])


def test_readme_says_what_the_committed_results_say():
    """Picture and sentences are made of them by `make readme`."""
    from w2r2.report.details import details_text, picture_caption
    from w2r2.report.headline import headline, headline_text

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    caption, findings = picture_caption(headline(ROOT / "reports")[0]), details_text(ROOT / "reports")
    made = [*headline_text(ROOT / "reports"), caption, *(text.replace("](../", "](") for text in findings)]
    assert [sentence for sentence in made if sentence not in readme] == [], "make readme"
    section = readme.partition("## More of the result")[2].partition("\n## ")[0]
    for text in made:
        section = section.replace(text, "")
    assert re.findall(r"[0-9]\.[0-9]", section) == []  # no measured number beside those that are made
    assert readme.index("reports/figures/headline.svg") < readme.index("**Asked:**") < readme.index("make repro")


@built
def test_groups_of_the_side_bar_fold():
    landing, page = (
        re.findall(r'<details class="group"( open)?>', (SITE / "nbs" / name).read_text(encoding="utf-8"))
        for name in ("contents.html", "scans/00_geometry.html")
    )
    assert len(landing) == len(page) > 8
    assert [bool(group) for group in landing] == [True] + [False] * (len(landing) - 1)
    assert sum(map(bool, page)) == 2


@built
def test_pages_link_to_what_exists_and_load_nothing_from_outside():
    pages, wrong = {path: Page(path) for path in PAGES}, []
    for path, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if address in page.loads and (parts.netloc or parts.scheme not in ("", "data")):
                fine = False
            elif parts.scheme or address == "#":
                fine = True
            else:
                fine = target.is_file() and (
                    not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids
                )
            if not fine:
                wrong.append(f"{path.relative_to(SITE)}: {address}")
    assert len(pages) > 40 and wrong == []


def until(tab, condition):
    """Waits for a JavaScript condition."""
    from browser import wait

    wait(lambda: tab.run(condition), condition)


def outside(tab):
    return [url for url in tab.requests if urlsplit(url).scheme not in ("file", "data", "blob")]


@built
def test_pages_in_a_browser_on_a_phone(tab):
    """Nothing from outside, nothing on the console, formulas typeset, text no wider than the screen."""
    wrong, formulas = {}, 0
    for path in PAGES:
        tab.open(path.as_uri(), width=390, height=844)
        if tab.run("'MathJax' in window"):
            tab.run("MathJax.startup.promise.then(() => true)")
        found = {
            "outside": outside(tab),
            "console": tab.complaints,
            "bad formulas": tab.run("document.querySelectorAll('mjx-merror').length"),
            "formulas not typeset": tab.run(
                "[...document.querySelectorAll('.math')].filter(place => !place.querySelector('mjx-container')).length"
            ),
            "too wide by": max(0, tab.run("document.documentElement.scrollWidth") - 390),
        }
        formulas += tab.run("document.querySelectorAll('mjx-container').length")
        if found := {about: value for about, value in found.items() if value}:
            wrong[str(path.relative_to(SITE))] = found
    assert wrong == {} and formulas > 20


@built
def test_a_figure_answers_the_mouse(tab):
    """The mouse circles over a room until it meets an object, whose description appears."""
    tab.open((SITE / "nbs" / "rooms" / "08_release.html").as_uri(), width=640, height=640)
    until(tab, "document.querySelector('.plotly-figure .main-svg') !== null")
    left, top, width, height = tab.run("""(() => {
        const figure = document.querySelector('.plotly-figure');
        figure.on('plotly_hover', () => window.shown ||= figure.querySelector('.hovertext')?.textContent);
        figure.scrollIntoView({block: 'center', behavior: 'instant'});
        const {x, y, width, height} = figure.getBoundingClientRect();
        return [x, y, width, height];
    })()""")
    for x, y in sorted(
        product(range(-20, 20), repeat=2), key=lambda at: at[0] ** 2 + at[1] ** 2
    ):  # in pixels / 10, from the middle outwards
        tab.move(left + width / 2 + 10 * x, top + height / 2 + 10 * y)
        if text := tab.run(
            "new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn))).then(() => "
            "window.shown || '')"
        ):
            break
    assert len(text.split()) > 3, "hovering shows a description"


@built
def test_search_works_without_a_server(tab):
    tab.open((SITE / "search.html").as_uri() + "?q=intersection")
    until(tab, "document.querySelectorAll('#search-results li a').length > 0")
    assert tab.complaints == outside(tab) == []
