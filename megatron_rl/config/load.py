"""From YAML files and overrides to a typed `Config`, and back.

    files (`base:` first, later wins)  ->  one plain tree  <-  overrides key=value  ->  OmegaConf  ->  Config

Every file and every override is held against the schema on its own, so that an error names the place where it was
written. OmegaConf then resolves interpolations (`${oc.env:HOME}`), fills in defaults and builds the dataclasses.
What a combination of values may be is not known here; see `validate.py`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config.errors import ConfigError, shown
from megatron_rl.config.schema import Config

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_MISSING = "???"


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file. Its key `base` names one file or a list of files, relative to it, that it builds on.
        overrides: 'dotted.key=value' each, value in YAML; items of a list by number: 'rewards.functions.0.weight=2'.

    Raises:
        ConfigError: unknown key, wrong type, missing key, malformed YAML, missing file, or a cycle of bases.
    """
    tree: dict[str, Any] = {}
    for source, layer in _layers(Path(path), ()):
        _check(layer, Config, "", source)
        tree = _merged(tree, layer)
    for override in overrides:
        source = f"override '{override}'"
        tree = _assigned(tree, override, source)
        _check(tree, Config, "", source)
    return _build(tree, str(path))


def save_config(config: Config, path: Path | str) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal `Config`."""
    text = yaml.safe_dump(plain_values(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def plain_values(config: Config) -> dict[str, Any]:
    """The configuration as YAML holds it."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config))
    return values


def _layers(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file's name and content, those that it builds on first. `above` are the files that led here."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: base: the file builds on itself, by way of {above[-1].name}")
    content = _read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: given {shown(bases)}, allowed: a file or a list of files")
    for base in bases:
        if not (path.parent / base).is_file():
            raise ConfigError(f"{path}: base: given '{base}', but {path.parent / base} is no file")
        yield from _layers(path.parent / base, (*above, path.resolve()))
    yield str(path), content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: malformed YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: given {shown(content)}, allowed: keys and values")
    return cast(dict[str, Any], content)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both trees; where both have a value the one above wins. Lists are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _assigned(tree: dict[str, Any], override: str, source: str) -> dict[str, Any]:
    """The tree with one override; the tree given stays as it is."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{source}: given no dotted.key=value")
    try:
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: {key}: malformed value: {_first_line(error)}") from error
    return cast(dict[str, Any], _replaced(tree, key.split("."), value["value"], source))


def _replaced(node: Any, segments: list[str], value: Any, source: str) -> Any:
    if not segments:
        return _merged(node, value) if isinstance(node, dict) and isinstance(value, dict) else value
    head, rest = segments[0], segments[1:]
    if isinstance(node, list):
        if not head.isdecimal() or int(head) >= len(node):
            raise ConfigError(f"{source}: given item '{head}', allowed: 0 to {len(node) - 1}")
        items = list(node)
        items[int(head)] = _replaced(node[int(head)], rest, value, source)
        return items
    below = node if isinstance(node, dict) else {}
    return {**below, head: _replaced(below.get(head), rest, value, source)}


def _check(value: Any, expected: Any, key: str, source: str) -> None:
    """Raise unless the plain YAML value at `key` fits the type that the schema expects there."""
    if expected is Any or (isinstance(value, str) and (value == _MISSING or "${" in value)):
        return
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not types.NoneType]
        if value is not None:
            _check(value, inner[0], key, source)
    elif dataclasses.is_dataclass(expected):
        _expect(isinstance(value, dict), value, "a section of keys", key, source)
        hints = typing.get_type_hints(expected)
        for name, item in list(value.items()):
            if name not in hints:
                raise ConfigError(f"{source}: {_joined(key, name)}: unknown key; {_hint(key, str(name), list(hints))}")
            if item is False and isinstance(hints[name], type) and "off" in getattr(hints[name], "__members__", ()):
                value[name] = item = "off"  # as which YAML reads a bare `off`
            _check(item, hints[name], _joined(key, name), source)
    elif origin is list:
        _expect(isinstance(value, list), value, "a list", key, source)
        for i, item in enumerate(value):
            _check(item, arguments[0], f"{key}[{i}]", source)
    elif origin is dict:
        _expect(isinstance(value, dict), value, "a section of keys", key, source)
    elif issubclass(expected, Enum):
        names = ", ".join(expected.__members__)
        _expect(isinstance(value, str) and value in expected.__members__, value, names, key, source)
    else:
        fits = isinstance(value, (int, float) if expected is float else expected)
        # bool is a subclass of int, but `true` is no number.
        _expect(fits and isinstance(value, bool) == (expected is bool), value, _SCALARS[expected], key, source)


def _expect(fits: bool, value: Any, allowed: str, key: str, source: str) -> None:
    if not fits:
        place = f"{source}: {key}" if key else source
        raise ConfigError(f"{place}: given {shown(value)}, allowed: {allowed}")


def _hint(section: str, name: str, siblings: list[str]) -> str:
    """The nearest valid key: one of the same name in another section, else a similar one in this section."""
    namesakes = [key for key in _dotted_keys(Config, "") if key.rpartition(".")[2] == name]
    similar = [_joined(section, match) for match in difflib.get_close_matches(name, siblings, n=1)]
    if nearest := namesakes or similar:
        return f"did you mean {' or '.join(nearest)}?"
    return f"allowed: {', '.join(siblings)}"


def _dotted_keys(node: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(node).items():
        yield _joined(prefix, name)
        if dataclasses.is_dataclass(hint):
            yield from _dotted_keys(cast(type, hint), _joined(prefix, name))


def _build(tree: dict[str, Any], source: str) -> Config:
    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), tree)
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{source}: {', '.join(missing)}: missing, must be given")
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{source}: {key}{_first_line(error)}") from error


def _plain(value: Any) -> Any:
    """Enums by name, and '${' escaped, which would be an interpolation when read back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _joined(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
