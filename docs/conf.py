"""`make docs`: README, pages and docstrings as one site. It imports the installed package with its compiled library."""

import re

import dsc_ops

project, author = "dsc_ops", "the dsc_ops authors"
copyright = author  # noqa: A001  the name that Sphinx reads
version = release = dsc_ops.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# Every reference has to lead somewhere: the build stops at warnings. Names of Python and torch have no pages here.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|typing_extensions|pathlib|numbers)\..*"),
    (r"py:.*", r"(nn\.)?(Module|Sequential|Conv1d|Conv2d)|Tensor|Sequence|Callable|Self|Activation"),
    (r"py:.*", r"(int|float|bool|str|list|tuple|dict|None|object|optional)"),
]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("Size", "Padding", "Activation")}
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
napoleon_use_rtype = False  # what is returned is told in sentences
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"dsc_ops {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "monokai"

# What is no text of its own: literals, roles and links of reStructuredText.
MARKED = re.compile(r"(``.+?``|:\w+:`[^`]+`|`[^`]+`_*)")


def formulas(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep |u|, (N, *), x_ and "M." as they are written in docstrings: reStructuredText takes them for markup."""
    example = False
    for number, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>> "))
        if example:
            continue
        pieces = MARKED.split(line)
        pieces[::2] = [re.sub(r"([*|]|_(?!\w)|(?<=\b[A-Z])\.$)", r"\\\1", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)
        if number and lines[number - 1].strip() == "Returns:":  # an empty type: a colon in the sentence would end one
            lines[number] = re.sub(r"^(\s*)", r"\1: ", lines[number])


def setup(app) -> None:
    app.connect("autodoc-process-docstring", formulas, priority=100)  # before napoleon makes markup of its own
