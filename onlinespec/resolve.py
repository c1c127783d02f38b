"""Config values from files and overrides: merged left to right, checked, each with where it came from.

Files merge left to right, then `section.field=value` overrides. Unknown keys, duplicate keys and values out of
range are errors that name the source, the path, what was found, what was wanted and what to do.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from onlinespec.config import Config
from onlinespec.errors import ConfigError


@dataclass(frozen=True)
class Resolved:
    """A config, and where each of its values that is no default was set."""

    config: Config
    sources: dict[str, str]
    """`gate.alpha` -> `a.yaml:3` or `--set gate.alpha=0.1`; a path that is absent has its default"""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"{loader.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise ConfigError(f"{where}: key {key!r} is no name; `onlinespec config` prints every field")
        if key in seen:
            raise ConfigError(f"{where}: key {key!r} appears twice; keep one")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, name: str) -> tuple[Any, dict[str, str]]:
    """The value, and `name:line` of every key below it by its dotted path."""
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_places(node, name, ""))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML ({' '.join(str(error).split())}); fix it") from error
    finally:
        loader.dispose()


def _places(node: yaml.Node, name: str, prefix: str):
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            path = f"{prefix}{key_node.value}"
            yield path, f"{name}:{key_node.start_mark.line + 1}"
            yield from _places(value_node, name, f"{path}.")


def _merge(into: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
    return into


def parse_override(text: str) -> dict[str, Any]:
    """Turn `section.field=value` into a nested dict.

    Raises: ConfigError where there is no `=`.
    """
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise ConfigError(f"override {text!r}: wanted section.field=value")
    nested: Any = _parse_yaml(value, text)[0]
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return nested


def resolve(files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> Resolved:
    """Merge YAML files left to right, then the overrides, and check every value.

    Raises: ConfigError naming the file or override, the path, what was found and what was wanted.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file; give the path of a YAML file")
        found, places = _parse_yaml(_text_of(path), str(path))
        merged = _checked(merged, {} if found is None else found, str(path))
        sources |= places
    for override in overrides:
        update = parse_override(override)
        merged = _checked(merged, update, f"override {override!r}")
        sources |= dict.fromkeys(_leaves(update), f"--set {override}")
    return Resolved(msgspec.convert(merged, Config), sources)


def load_config(files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> Config:
    """The config of `resolve`. Raises: ConfigError."""
    return resolve(files, overrides).config


def dump_config(config: Config) -> str:
    """YAML of every resolved value, loadable by `load_config`."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)


def _leaves(value: Any, prefix: str = ""):
    """Dotted paths of what is no mapping."""
    if not isinstance(value, dict):
        yield prefix
        return
    for key, item in value.items():
        yield from _leaves(item, f"{prefix}.{key}" if prefix else key)


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the path of a YAML file") from error


def _checked(merged: dict[str, Any], update: Any, source: str) -> dict[str, Any]:
    """Merge and convert at once, so that an error names the source that brought it."""
    if not isinstance(update, dict):
        raise ConfigError(f"{source}: found {type(update).__name__}, wanted a mapping of sections")
    merged = _merge(merged, update)
    try:
        msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_told(error, merged)}") from error
    return merged


def _told(error: msgspec.ValidationError, merged: dict[str, Any]) -> str:
    """Found, wanted, fix. msgspec names the path and the one bound that was broken; here are the value and both."""
    what, _, path = str(error).replace("`", "").partition(" - at $")
    path = path.removeprefix(".").partition("[")[0]
    unknown = what.removeprefix("Object contains unknown field ")
    if unknown != what:
        return _told_unknown(f"{path}.{unknown}" if path else unknown)
    value: Any = merged
    for part in path.split(".") if path else ():
        value = value[part]
    kind = type_at(path)
    if isinstance(kind, msgspec.inspect.StructType) and isinstance(value, dict):
        return f"{path}.{what}" if path else what  # a section's own check of several fields
    return f"{path} is {value!r}, wanted {wanted(kind)}; `onlinespec config explain {path}` says what it means"


def _told_unknown(path: str) -> str:
    """The nearest known path: one that is spelt alike, or the same field in another section."""
    fields = field_paths()
    known = {*fields, *(name.partition(".")[0] for name in fields)}
    elsewhere = [name for name in fields if name.rpartition(".")[2] == path.rpartition(".")[2]]
    near = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.75) or elsewhere
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown key {path}; {meant}`onlinespec config` prints every field"


def field_paths() -> dict[str, msgspec.inspect.Type]:
    """Type of every field by its dotted path, in the order of the schema."""
    root = msgspec.inspect.type_info(Config)
    assert isinstance(root, msgspec.inspect.StructType)
    found = {}
    for section in root.fields:
        assert isinstance(section.type, msgspec.inspect.StructType)
        found.update({f"{section.name}.{field.name}": field.type for field in section.type.fields})
    return found


def type_at(path: str) -> msgspec.inspect.Type:
    """Of a field, a section, or the whole config, which is the empty path."""
    kind: msgspec.inspect.Type = msgspec.inspect.type_info(Config)
    for part in path.split(".") if path else ():
        assert isinstance(kind, msgspec.inspect.StructType)
        kind = next(field.type for field in kind.fields if field.name == part)
    return kind


def wanted(kind: msgspec.inspect.Type) -> str:
    """A type and its bounds in words: `a number above 0 and below 1`."""
    match kind:
        case msgspec.inspect.IntType():
            return f"an integer {_bounds(kind)}".strip()
        case msgspec.inspect.FloatType():
            return f"a number {_bounds(kind)}".strip()
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
        case msgspec.inspect.StrType():
            return f"text that matches {kind.pattern}"
        case msgspec.inspect.VarTupleType():
            return "a list of names"
        case msgspec.inspect.StructType():
            return "a mapping of fields"
    raise AssertionError(f"a config field of kind {kind} has no words yet")


def _bounds(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    limits = {"of at least": kind.ge, "above": kind.gt, "of at most": kind.le, "below": kind.lt}
    parts = [f"{words} {_plain(limit)}" for words, limit in limits.items() if limit is not None]
    return " and ".join(parts[:1] + [part.removeprefix("of ") for part in parts[1:]])


def _plain(limit: float) -> str:
    """0.0 -> 0."""
    return str(int(limit)) if limit == int(limit) else str(limit)
