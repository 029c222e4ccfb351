"""The site: executed notebooks as pages, with a reference out of their exported cells. Built from the root of the
repository."""

import ast
import html
import importlib.metadata
import json
import re
from inspect import Parameter
from pathlib import Path

import papermill  # before w2r2.engine, which it loads as its plugin
import plotly
import yaml
from docutils import nodes
from fastcore.docments import docments

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"

project, author, copyright = "W2R2", "The W2R2 developers", "2026, the W2R2 developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode"]
root_doc = "nbs/contents"
include_patterns = ["nbs/**", "reports/notebooks/*", "reports/tables/paper/claims.md", "reports/verdict.md"]
exclude_patterns = [".*", "_docs", "build", "data", "w2r2", "tests", "nbs/pipeline", "**/.ipynb_checkpoints"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}

# Nothing is loaded from the network: MathJax and plotly come from their wheels.
mathjax = next(
    file.locate() for file in importlib.metadata.files("sphinx-mathjax-offline") if file.name == "tex-svg-full.js"
)
mathjax_path = mathjax.name
html_static_path = ["_static", str(mathjax), str(Path(plotly.__file__).parent / "package_data" / "plotly.min.js")]
html_extra_path = [
    str(path) for kind in ("*.html", "plotly.min.js") for path in sorted((REPORTS / "figures").rglob(kind))
]
html_theme = "furo"
html_title = "W2R2: where, not what"
html_css_files = ["site.css"]
html_js_files = [("tables.js", {"defer": "defer"})]
html_copy_source = html_show_search_summary = False  # summaries need a server
templates_path = ["_templates"]
html_additional_pages = {"index": "to_contents.html"}

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables in outputs, too
nb_ipywidgets_js = {}  # a progress bar needs no script from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a table may start below level 1
default_role = "py:obj"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand with the parameters
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88


def cells(path: Path) -> list[tuple[dict, str, set[str]]]:
    "Every cell of a notebook, its text, and the names of its directives (`#| export`)."
    texts = [(cell, "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return [(cell, text, set(re.findall(r"^#\| *(\w+)", text, re.M))) for cell, text in texts]


def module_of(path: Path) -> str:
    "The module that a notebook exports, such as `w2r2.scans.geometry`; empty if it exports none."
    name = next(
        (found[1] for _, text, _ in cells(path) if (found := re.search(r"^#\| *default_exp +(\S+)", text, re.M))), ""
    )
    return name and f"w2r2.{name.removesuffix('.__init__')}"


def definitions(path: Path) -> dict[str, int]:
    "Number of the cell in which a notebook defines each of its exported names."
    return {
        node.name: number
        for number, (_, text, directives) in enumerate(cells(path))
        if "export" in directives
        for node in ast.parse(text).body
        if hasattr(node, "name")
    }


LIBRARY = {module: path for path in sorted(ROOT.glob("nbs/**/[0-9]*.ipynb")) if (module := module_of(path))}
DEFINED = {module: definitions(path) for module, path in LIBRARY.items()}


# ---- pages of notebooks
# -------------------------------------------------------------------------------------------------
def plotly_output(figure: dict) -> str:
    "A figure for figures.js to draw."
    content = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
    height = figure.get("layout", {}).get("height", 450)
    return (
        f'<div class="plotly-figure" style="height:{height}px"><script type="application/json">{content}</script></div>'
    )


def page_of_audit(app, docname: str, source: list[str]) -> None:
    "A title."
    if docname == "reports/tables/paper/claims":
        source[0] = f"# Claims of the paper\n\n{source[0]}"


def page_of_notebook(app, docname: str, source: list[str]) -> None:
    """Folds what `#| hide` marks, and all code of the executed pipeline, whose readers want its results; drops the
    directives, makes plotly figures drawable and adds the reference."""
    path = ROOT / f"{docname}.ipynb"
    if not path.is_file():
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        text = "".join(cell["source"])
        directives = set(re.findall(r"^#\| *(\w+)", text, re.M))
        cell["source"] = re.sub(r"^#\|.*\n?", "", text, flags=re.M)
        tags = [
            tag
            for tag, wanted in {
                "exported": "export" in directives,
                "hide-cell": "hide" in directives,
                "hide-input": docname.startswith("reports/notebooks/"),
                "remove-cell": not cell["source"].strip(),
            }.items()
            if wanted
        ]
        cell["metadata"]["tags"] = cell["metadata"].get("tags", []) + tags
        for output in cell["outputs"]:
            if figure := output.get("data", {}).get("application/vnd.plotly.v1+json"):
                output["data"] = {"text/html": plotly_output(figure)}
    if module := next((name for name, library in LIBRARY.items() if library == path), ""):
        reference = f"## Reference\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```"
        notebook["cells"].append({"cell_type": "markdown", "id": "reference", "metadata": {}, "source": reference})
    source[0] = json.dumps(notebook)


def number_cells(app, doctree: nodes.document) -> None:
    "An address for every code cell: #cell-NUMBER."
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code":
            cell["ids"].append(f"cell-{cell['cell_index']}")


def scripts_of_page(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    if 'class="plotly-figure"' in context.get("body", ""):
        app.add_js_file("plotly.min.js")
        app.add_js_file("figures.js")


def fold_groups(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    "In the side bar, every group but the first and that of the page itself is folded; it opens without a script."
    before, *groups = re.split(r'(?=<p class="caption")', context.get("furo_navigation_tree", ""))
    folded = [before]
    for group in groups:
        heading, links, after = re.fullmatch(r"<p[^>]*>(.*?)</p>(.*</ul>)(.*)", group, re.S).groups()
        shown = " open" if group is groups[0] or "current" in links else ""
        folded.append(
            f'<details class="group"{shown}><summary class="caption">{heading}</summary>{links}</details>{after}'
        )
    context["furo_navigation_tree"] = "".join(folded)


# ---- reference
# ----------------------------------------------------------------------------------------------------------
def rst(text: str) -> str:
    "Plain text with `names` as reStructuredText."
    parts = re.split(r"(`[^`]+`)", text)
    return "\\ ".join(part if part.startswith("`") else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for part in parts)


def document_parameters(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    "What stands beside the parameters in the source, as fields."
    lines[:] = [rst(line) for line in lines]
    if what not in ("class", "function", "method"):
        return
    lines.append("")
    for parameter, about in docments(obj, full=True).items():
        text, kind = rst(" ".join((about.docment or "").split())), about.anno
        named = (
            ""
            if kind in (None, Parameter.empty)
            else getattr(kind, "__name__", None)
            if isinstance(kind, type) and not hasattr(kind, "__args__")
            else str(kind)
        )
        if parameter == "self" or not (text or named):
            continue
        lines.append(f":returns: {text}" if parameter == "return" else f":param {parameter}: {text}")
        if named:
            lines.append(f":rtype: {named}" if parameter == "return" else f":type {parameter}: {named}")


def skip_imported(app, what: str, name: str, obj, skip: bool, options) -> bool | None:
    "A module documents what it defines, not what it passes on."
    return (
        True
        if getattr(obj, "__module__", "").startswith("w2r2.")
        and obj.__module__ != app.env.current_document.autodoc_module
        else None
    )


def linkcode_resolve(domain: str, info: dict) -> str | None:
    "The cell, on the same page, that defines it."
    cell = DEFINED.get(info["module"], {}).get(info["fullname"].split(".")[0])
    return None if cell is None else f"#cell-{cell}"


def link_names(app, doctree: nodes.document, docname: str) -> None:
    "A `name` in the text leads to its reference, if only one module has it."
    objects = {}
    for entry in app.env.get_domain("py").get_objects():
        objects.setdefault(entry[0].split(".")[-1], []).append(entry)
    for literal in list(doctree.findall(nodes.literal)):
        found = objects.get(literal.astext(), [])
        if len(found) != 1 or isinstance(literal.parent, (nodes.reference, nodes.title)):
            continue
        _, _, kind, target, anchor, _ = found[0]
        literal.replace_self(
            nodes.reference(
                "",
                "",
                literal.deepcopy(),
                internal=True,
                refuri=app.builder.get_relative_uri(docname, target) + "#" + anchor,
            )
        )


# ---- pages of results
# ---------------------------------------------------------------------------------------------------
def origin(path: Path) -> str:
    """Link to the cell that made a file: in the notebook of the stage that declares it or its folder, the first cell
    that names either."""
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values():
        declared = [
            out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots")
            for out in stage.get(kind, [])
        ]
        notebook = next((ROOT / out for out in declared if out.endswith(".ipynb") and (ROOT / out).is_file()), None)
        if notebook is None or not {path, *path.parents} & {ROOT / out for out in declared}:
            continue
        code = [
            (number, text)
            for number, (cell, text, _) in enumerate(cells(notebook))
            if cell["cell_type"] == "code" and not text.startswith("assert")
        ]
        named = [
            number
            for name in (path.name, f'"{path.stem}"', f'"{path.parent.name}"')
            for number, text in code
            if name in text
        ]
        return (
            f'<a href="../reports/notebooks/{notebook.stem}.html{f"#cell-{named[0]}" if named else ""}">made here</a>'
        )
    return ""


def files(folder: str, *kinds: str) -> dict[str, dict[str, Path]]:
    "Files below a folder of reports by place, without ending, then by ending."
    found = {}
    for path in sorted((REPORTS / folder).rglob("*")):
        if path.suffix in kinds:
            found.setdefault(path.relative_to(REPORTS / folder).with_suffix("").as_posix(), {})[path.suffix] = path
    return found


def described(name: str, kinds: dict[str, Path], content: str) -> str:
    downloads = [f"{{download}}`{kind[1:]} <../{path.relative_to(ROOT).as_posix()}>`" for kind, path in kinds.items()]
    made = next((link for path in kinds.values() if (link := origin(path))), "")
    title = name.rpartition("/")[2].replace("_", " ").capitalize()
    return f"### {title}\n\n{content}\n\n{' · '.join(filter(None, [made, *downloads]))}\n\n"


LONGEST_TABLE = 60  # rows shown; longer ones are there to download


def tables() -> str:
    text = ""
    for name, kinds in files("tables", ".csv", ".md", ".tex").items():
        if name == "paper/claims":
            continue
        if ".md" in kinds:
            content = f"```{{include}} ../reports/tables/{name}.md\n:heading-offset: 3\n:relative-docs: ..\n```"
        elif ".csv" in kinds and kinds[".csv"].read_text(encoding="utf-8").count("\n") <= LONGEST_TABLE:
            content = f"```{{csv-table}}\n:file: ../reports/tables/{name}.csv\n:header-rows: 1\n```"
        else:
            content = ""
        text += described(name, kinds, content)
    return text


def figures() -> str:
    text = ""
    for name, kinds in files("figures", ".svg", ".png", ".pdf", ".json", ".html").items():
        content = ""
        if ".json" in kinds:
            content = plotly_output(json.loads(kinds[".json"].read_text(encoding="utf-8")))
        elif image := kinds.get(".svg") or kinds.get(".png"):
            content = f"![{html.escape(name.replace('_', ' '))}](../{image.relative_to(ROOT).as_posix()})"
        if page := kinds.pop(".html", None):
            content += f'\n\n<a href="../{page.name}">Open the interactive figure</a>'
        text += described(name, kinds, content)
    return text


def the_answer() -> str:
    "What nbs/index.ipynb says of the result: a picture and five sentences."
    outputs = (output for cell, *_ in cells(ROOT / "nbs" / "index.ipynb") for output in cell.get("outputs", ()))
    return next("".join(output["data"]["text/markdown"]) for output in outputs if "data" in output)


def audit() -> str:
    if (REPORTS / "tables" / "paper" / "claims.md").is_file():
        return "[the audit of its claims](../reports/tables/paper/claims.md)"
    return "the audit of its claims, once `make repro` has made it"


def verdict() -> str:
    if (REPORTS / "verdict.md").is_file():
        return "[the verdict](../reports/verdict.md) of the last rerun, number by number"
    return "the verdict that `make repro` ends with, once it has run here"


myst_substitutions = {
    "audit": audit(),
    "verdict": verdict(),
    "answer": the_answer(),
    "tables": tables(),
    "figures": figures(),
}


def setup(app) -> dict:
    app.connect("source-read", page_of_audit)
    app.connect("source-read", page_of_notebook)
    app.connect("doctree-read", number_cells)
    app.connect("doctree-resolved", link_names)
    app.connect("html-page-context", scripts_of_page)
    app.connect("html-page-context", fold_groups, priority=900)  # after the theme has made the side bar
    app.connect("autodoc-process-docstring", document_parameters)
    app.connect("autodoc-skip-member", skip_imported)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
