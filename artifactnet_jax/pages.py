"""Pages: HTML from the templates in the package's assets, every value escaped."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from artifactnet_jax.text import clock, printable

ASSETS = Path(__file__).parent / "assets"


def page(template: str, **values: Any) -> str:
    """The page that a template of the assets gives. `values` are escaped, `Markup` is HTML already.

    Templates may call `asset(name)`, the text of another file as HTML; `sha256(text)`, its digest
    in base64 as a Content-Security-Policy names it; `clock`; `printable`; `name_of(path)`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"asset": asset, "sha256": sha256, "clock": clock}
    environment.globals |= {"printable": printable, "name_of": name_of}
    return environment.get_template(template).render(values)


def name_of(path: str) -> str:
    """The name of a file, on one line."""
    return printable(os.path.basename(path))


def clean(text: str) -> str:
    """Text that a page can hold: surrogates are escaped, control characters become spaces."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\u00a0" else " " for c in text)


def _shown(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def asset(name: str) -> Markup:
    """The text of an asset, as HTML."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def sha256(text: str) -> str:
    """SHA-256 of a text in base64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
