"""Renders a template as one self-contained HTML page: style, script and pictures inside, nothing fetched.

The page's own policy forbids the browser every request and every script but `page.js`, so that a caption could not run
code even if it were not escaped.
"""

import base64
import hashlib
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlp.report import words
from vlp.report.graph import shorten

HERE = Path(__file__).parent


def environment() -> Environment:
    """Return the Jinja environment of all reports: autoescape on, the functions of `words` as filters."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = [words.count, words.short, words.plain, words.score, words.measure, words.duration, words.when]
    filters += [words.title, words.plural, words.share, shorten]
    env.filters.update({function.__name__: function for function in filters})
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    env.globals.update(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")), script=Markup(script), script_digest=digest
    )
    return env


def write_page(template: str, path: Path, **values: object) -> Path:
    """Render `template` to `path`, which appears complete or not at all."""
    text = environment().get_template(template).render(**values)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    unfinished.replace(path)
    return path
