"""A file of API keys for tests, with the value of each key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.access import key_file
from service.access.key_file import ApiKey


@dataclass
class KeySet:
    """The keys in `path`. `values` has the value of each key by name."""

    path: Path
    values: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, *scopes: str, **limits: Any) -> str:
        """Add a key to the file and return its value."""
        value = key_file.new_value()
        key_file.add(self.path, name, ApiKey(sha256=key_file.hash_of(value), scopes=frozenset(scopes), **limits))
        self.values[name] = value
        return value

    def remove(self, name: str) -> None:
        """Remove a key from the file."""
        key_file.remove(self.path, name)

    def headers(self, name: str) -> dict[str, str]:
        """Return the header with which a client sends the key."""
        return {"Authorization": f"Bearer {self.values[name]}"}


def one_key_per_scope(path: Path) -> KeySet:
    """Return a new file with one key per scope. Each key is named after its scope."""
    keys = KeySet(path)
    for scope in ("infer", "write", "metrics", "admin"):
        keys.add(scope, scope)
    return keys
