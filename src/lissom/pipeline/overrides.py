"""``--set key=value``: a bare key reaches the steps that spell it out, else all that have it, else ``save`` and ``calibration``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from ..methods import METHODS
from .constraints import ConstraintSettings
from .settings import suggest

CONSTRAINT = {f.name for f in dataclasses.fields(ConstraintSettings)}


def takes(use: str) -> set[str]:
    """Settings that a step of the method has."""
    method = METHODS[use]
    return set(method.settings()) | (CONSTRAINT if method.kind == "solver" else set())


def apply(
    text: str,
    entries: list[dict[str, Any]],
    sections: dict[str, dict[str, Any]],
    fields: Mapping[str, type],
    problems: list[str],
) -> None:
    """Set what ``text`` says in the steps ``entries`` or in ``sections``, whose settings are ``fields``; mistakes go to ``problems``."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"--set {text!r}: write key=value")
        return
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        problems.append(f"--set {text!r}: the value is not valid YAML")
        return
    owner, dot, short = key.rpartition(".")
    if dot and owner in sections:
        sections[owner][short] = value
        return
    if dot:
        named = [e for e in entries if e["use"] == owner]
        if not named:
            problems.append(f"--set {text!r}: no step {owner!r}{suggest(owner, [e['use'] for e in entries])}")
        for entry in named:
            entry[short] = value
        return
    spelled = [e for e in entries if key in e and key != "use"]
    able = spelled or [e for e in entries if key in takes(e["use"])]
    for entry in able:
        entry[key] = value
    for section, cls in fields.items():
        if not able and key in {f.name for f in dataclasses.fields(cls)}:
            sections[section][key] = value
            return
    if not able:
        known = {k for e in entries for k in takes(e["use"])}
        known |= {f.name for cls in fields.values() for f in dataclasses.fields(cls)}
        problems.append(f"--set {text!r}: no step of this recipe has a setting {key!r}{suggest(key, sorted(known))}")
