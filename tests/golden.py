"""Figures of the published evaluators on synthetic inputs, kept in tests/fixtures."""

import gzip
import json
from pathlib import Path


def golden(name):
    """The content of fixtures/NAME.json.gz; NaN stands as a bare NaN."""
    with gzip.open(Path(__file__).parent / "fixtures" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)
