"""Recipes: YAML files and overrides to a checked configuration, and mistakes to messages that name the field."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo

from sdft_dist.config import Config, Section
from sdft_dist.errors import ConfigError

S = TypeVar("S", bound=Section)
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # a number that YAML 1.1 takes for text
Override = str | Mapping[str, Any]


# Of a recipe; in YAML one name will do.
Files = Annotated[list[str], BeforeValidator(lambda own: [own] if isinstance(own, str) else own), Field(min_length=1)]


def load_config(path: str | Path | Sequence[str], overrides: Iterable[Override] = ()) -> Config:
    """Read a YAML recipe, or several one over the other, and apply overrides, in order: `section.field=value` (values
    are YAML); another YAML file, whose fields replace those of the same name; or values by the dotted names of their
    fields.

    Raises ConfigError with one line per mistake: field, value got, what is valid.
    """
    tree: dict[str, Any] = {}
    for file in [path] if isinstance(path, str | Path) else path:
        _merge(tree, load_yaml(file))
    for override in overrides:
        if isinstance(override, str) and is_layer(override):
            _merge(tree, load_yaml(override))
            continue
        for name, value in [_parse_override(override)] if isinstance(override, str) else override.items():
            _set(tree, name, value)
    return parse(Config, tree)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError where it is none, or gives a name twice."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a YAML file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.suffix in (".jsonl", ".parquet"):  # the first row would pass for a recipe with strange fields
        raise ConfigError(f"{path}: holds rows, expected a YAML file; rows are given as data.train={path}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    tree = _read_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, this is a {type(tree).__name__}")
    return tree


def _read_yaml(text: str, where: str) -> Any:
    """The value that YAML `text` holds. Raises ConfigError where it is none, or gives a name twice."""
    try:
        repeated = list(_repeated(yaml.compose(text, Loader=yaml.SafeLoader)))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:  # the second of a date that is none, or a number of too many digits
        raise ConfigError(f"{where}: not valid YAML: {e}") from e
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML for settings: it is nested too deeply, or in itself") from None
    if repeated:
        lines = (f"{name}: is there more than once in {where}, expected each name once" for name in repeated)
        raise ConfigError("\n".join(lines))
    return value


def _repeated(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """The dotted names that are given more than once, of which only the last would count."""
    if isinstance(node, yaml.MappingNode):
        named = [(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        names = Counter(name for name, _ in named)
        yield from (f"{prefix}{name}" for name, number in names.items() if number > 1)
        for name, value in named:
            yield from _repeated(value, f"{prefix}{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value, prefix)


def of_many_runs(path: Path, kind: str) -> dict[str, Any]:
    """The keys of a sweep's or a plan's file. Raises ConfigError where it is none, or a recipe."""
    tree = load_yaml(path)
    if "recipe" not in tree and tree.keys() & {"model", "data"}:
        raise ConfigError(f"{path}: is a recipe, expected a {kind}, which names it: recipe: {path}")
    return tree


def parse(section: type[S], tree: dict[str, Any]) -> S:
    """What `tree` holds, checked. Raises ConfigError with one line per mistake."""
    try:
        return section.model_validate(tree)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(section, err) for err in e.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """The values, as JSON has them, by the dotted names of their fields."""

    def leaves(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(leaves("", config.model_dump(mode="json")))


def is_layer(text: str) -> bool:
    """Whether an override names a file."""
    return "=" not in text and text.endswith((".yaml", ".yml"))


def _merge(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _parse_override(text: str) -> tuple[str, Any]:
    """YAML 1.1 reads 1e-5 as text; a user means a number, if it is one and stands without quotes."""
    key, sep, given = text.partition("=")
    if not sep or not key:
        raise ConfigError(f"{text!r}: an override reads section.field=value")
    try:
        value = _read_yaml(given, key)
    except ConfigError as e:
        if not given.startswith("{"):
            raise
        raise ConfigError(f"{e}\nText that begins with {{ needs quotes of its own: {key}='\"{{…\"'") from e
    if isinstance(value, str) and EXPONENT.fullmatch(given.strip()) and math.isfinite(float(value)):
        value = float(value)
    return key, value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section")
    value = copy.deepcopy(value)  # later overrides may write into it
    if isinstance(value, dict) and isinstance(node.get(leaf), dict) and not parents:
        _merge(node[leaf], value)  # a section, as a file would give it; other mappings are values
    else:
        node[leaf] = value


OVER_A_PRESET = "; sizes, models and tasks go over a preset: sdft train deploy/recipes/paper.yaml SIZE.yaml"


def _explain(root: type[Section], err: Any) -> str:
    where = ".".join(str(part) for part in err["loc"])
    if err["type"] == "extra_forbidden":
        elsewhere = [name for name, _ in dotted_fields(root) if name.rpartition(".")[2] == err["loc"][-1]]
        if elsewhere:
            return f"{where}: no such field; did you mean {' or '.join(elsewhere)}?"
        valid = _valid_names(root, err["loc"][:-1])
        close = difflib.get_close_matches(str(err["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, err['loc'][:-1]), close[0]])}?" if close else ""
        return f"{where}: no such field{'; ' + hint if hint else '; valid: ' + ', '.join(valid)}"
    if err["type"] == "missing":
        # Told once where both are missing.
        layer = where == "data" or (where == "model" and "data" in err["input"])
        return f"{where}: is required and missing{OVER_A_PRESET if layer else ''}"
    first = next((name for name, _ in dotted_fields(root) if name.startswith(f"{where}.")), None)
    if err["type"] == "model_type" and first:
        return f"{where}: got {err['input']!r}, but it is a section; did you mean {first}=…?"
    message = err["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where}: got {err['input']!r}: {message}"


def spelled(name: str) -> str:
    """A field's name with its sections before it, where only one is called so; else as it is."""
    found = [dotted for dotted, _ in dotted_fields(Config) if dotted.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else name


def dotted_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every section and field below `section`, by its name with its sections' before it."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if hasattr(field.annotation, "model_fields"):
            yield from dotted_fields(field.annotation, f"{prefix}{name}.")


def _valid_names(root: type[Section], loc: tuple[Any, ...]) -> list[str]:
    section: Any = root
    for name in loc:
        # Below a dictionary of sections, `name` is a key of it.
        section = section.model_fields[name].annotation if hasattr(section, "model_fields") else get_args(section)[1]
    return list(section.model_fields)
