"""What `onlinespec config explain` prints: each value with its default, its origin, its bounds and its line of doc.

The lines of doc are the string literals below the fields in config.py: read from its source, never written twice.
"""

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise

import msgspec

from onlinespec import config as schema
from onlinespec.config import Config
from onlinespec.errors import ConfigError
from onlinespec.resolve import Resolved, field_paths, wanted


def explain(resolved: Resolved, path: str = "") -> Iterator[str]:
    """Lines for one field, for a section, or for all.

    Raises: ConfigError where there is no such field.
    """
    fields = field_paths()
    chosen = [name for name in fields if path in ("", name, name.partition(".")[0])]
    if not chosen:
        sections = ", ".join(dict.fromkeys(name.partition(".")[0] for name in fields))
        raise ConfigError(f"no field or section is called {path!r}; the sections are {sections}")
    docs, defaults = _docs(), Config()
    for name in chosen:
        section, field = name.split(".")
        value = _shown(getattr(getattr(resolved.config, section), field))
        default = _shown(getattr(getattr(defaults, section), field))
        source = resolved.sources.get(name)
        origin = "the default" if source is None else f"from {source}; the default is {default}"
        yield f"{name} = {value}"
        yield f"    {origin}; wanted {wanted(fields[name])}"
        yield f"    {docs[name]}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _docs() -> dict[str, str]:
    """`section.field` -> the literal below it."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)}
    found = {}
    for section in msgspec.structs.fields(Config):
        for field, following in pairwise(classes[section.type.__name__].body):
            if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[f"{section.name}.{field.target.id}"] = " ".join(ast.literal_eval(following.value).split())
    return found
