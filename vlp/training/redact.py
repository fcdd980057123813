"""Keeps secrets out of everything that a run writes: by the name of a key, by the form of a value, and out of URLs."""

import os
import re
from collections.abc import Mapping
from typing import Any

from vlp.data.sandbox import SECRET_NAME

HIDDEN = "***"

_FORMS = (
    re.compile(r"(?<=://)[^/@\s]+(?=@)"),  # user:password of a URL
    re.compile(r"(?<=\?)[^\s\"'\],}]*=[^\s\"'\],}]*"),  # the query of a URL, where signatures travel
    re.compile(r"\b(?:hf|gh[opsur]|glpat|github_pat|npm|pypi|xox[abprs]|sk|pk|rk|wandb_v1)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),  # a JSON web token
    re.compile(r"(?<=Bearer )\S+|(?<=Basic )[A-Za-z0-9+/=]{8,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)
_ASSIGNED = re.compile(r"(?P<key>[\w.-]+)(?P<equals>=|: )(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;'\"]+)")
_SHORTEST = 6  # characters of a value of the environment that is worth hiding: shorter ones are words


def text(value: str) -> str:
    """Return a text without what looks like a secret, or is one of this process's environment."""
    for secret in _of_environment():
        value = value.replace(secret, HIDDEN)
    for form in _FORMS:
        value = form.sub(HIDDEN, value)
    return _ASSIGNED.sub(_hide_assigned, value)


def tree(node: Any, key: str = "") -> Any:
    """Return plain values without secrets; `key` is the name under which the node stands."""
    if isinstance(node, Mapping):
        return {name: tree(child, str(name)) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [tree(child, key) for child in node]
    if isinstance(node, str):
        return HIDDEN if node and SECRET_NAME.search(key) else text(node)
    return node


def _hide_assigned(match: re.Match[str]) -> str:
    return f"{match['key']}{match['equals']}{HIDDEN}" if SECRET_NAME.search(match["key"]) else match[0]


def _of_environment() -> list[str]:
    """Longest first, so that no part of one is left."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)
