"""`sdft fields`: what a recipe can say. Names, types, defaults and descriptions are those of config.py."""

from __future__ import annotations

import json
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.recipe import dotted_fields

KINDS = {bool: "true | false", int: "whole number", float: "number", str: "text", tuple: "list", dict: "mapping"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def describe(word: str, width: int) -> str:
    """Every field with `word` in its dotted name, in lines of at most `width` columns. Raises UserError where there is
    none."""
    found = [
        f"{name}: {_values(field)}; {_default(field)}\n"
        + textwrap.fill(field.description, width, initial_indent="    ", subsequent_indent="    ")
        for name, field in dotted_fields(Config)
        if field.description and word in name
    ]
    if not found:
        raise UserError(f"sdft fields: no field has {word!r} in its name; without a word all are listed")
    return "\n".join(found)


def _values(field: FieldInfo) -> str:
    """Type and bounds in words."""
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return " ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return _kind(next(own for own in get_args(annotation) if own is not type(None)))
    return KINDS[origin]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"default {json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)}"
