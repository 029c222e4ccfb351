"""The site: the executed notebooks as pages."""
project = "W2R2"
author = "The W2R2 developers"
copyright = "2026, the W2R2 developers"
extensions = ["myst_nb"]
nb_execution_mode = "off"
root_doc = "contents"
html_theme = "furo"
html_title = "W2R2: where, not what"
myst_enable_extensions = ["dollarmath", "amsmath"]
exclude_patterns = ["**.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "myst.xref_missing"]
