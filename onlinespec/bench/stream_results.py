"""The rows of a long bench in one JSON file: written whole after every row, so that a bench that was stopped goes on.

A file belongs to one bench with one set of settings; with other settings it is refused, never mixed.
"""

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from onlinespec.bench.provenance import commit, provenance
from onlinespec.errors import BenchError

Row = dict[str, Any]


class Results:
    """See the module's docstring. settings: JSON-able; all that decides what a row says."""

    def __init__(self, path: Path, kind: str, settings: dict[str, Any]):
        """Raises: BenchError where the file is of another bench or of other settings, naming the first."""
        self.path = path
        self.rows: list[Row] = []
        self.more: dict[str, Any] = {}
        """what was last written beside the rows"""
        self._kind = kind
        self._settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            found = json.loads(self.path.read_bytes())
        except json.JSONDecodeError as error:
            raise BenchError(f"{self.path}: no result of a bench ({error}); give another --json") from error
        if not isinstance(found, dict) or found.get("kind") != self._kind:
            kind = found.get("kind") if isinstance(found, dict) else type(found).__name__
            raise BenchError(f"{self.path}: holds {kind!r}, wanted {self._kind!r}; give another --json")
        for name, wanted in self._settings.items():
            if (there := found["settings"].get(name)) != wanted:
                raise BenchError(
                    f"{self.path}: was made with {name} {_short(there)}, wanted {_short(wanted)}; give another --json, "
                    "or the settings it began with"
                )
        self.rows = found.pop("rows")
        self.more = {name: value for name, value in found.items() if name not in ("kind", "provenance", "settings")}

    def find(self, **key: object) -> Row | None:
        """The row with these values."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def put(self, row: msgspec.Struct, **key: object) -> None:
        """Add a row, in the place of the one with the same key, and write the file."""
        self.rows = [there for there in self.rows if not all(there.get(name) == value for name, value in key.items())]
        self.rows.append({**msgspec.to_builtins(row), "commit": commit(), "time": _now()})
        self.write({})

    def write(self, more: dict[str, Any]) -> None:
        """The whole file, by rename; `more` beside the rows."""
        result = {
            "kind": self._kind,
            "provenance": provenance("", None),
            "settings": self._settings,
            **more,
            "rows": self.rows,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        temporary.rename(self.path)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
