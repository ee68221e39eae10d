"""Settings of a job: defaults < YAML files in order (`--config a.yaml`) < flags.

The files are checked against the dataclass, laid one over the other, and become the defaults of the
one parser of flags; the dataclass checks itself once, when all settings are known. A user's mistake
ends in one box on stderr and exit code 2 (settings) or 3 (damaged or foreign data), never in a
traceback.
"""

import dataclasses
import os
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import yaml

from cascade_model.errors import InputError, of_store
from cascade_model.nearest import cure
from jobs.ending import ended_by_signals
from jobs.yaml_text import document_in, text_of

Config = TypeVar("Config")


def command(
    config_class: type[Config], run: Callable[[Config], Any], action: str = ""
) -> Callable[..., int]:
    """The `main` of a job: parse the arguments, run, turn a user's mistake into a box."""

    @ended_by_signals
    def main(argv: Sequence[str] | None) -> int:
        try:
            stage = f"{stage_of(run)} {action}".rstrip()
            try:
                run(parse(config_class, sys.argv[1:] if argv is None else argv, stage))
            finally:
                sys.stdout.flush()
        except InputError as error:
            show_error(error)
            return error.exit_code
        except BrokenPipeError:
            return _closed_output()
        except Exception as error:
            told = of_store(error)
            if told is None:
                raise
            show_error(told)
            return told.exit_code
        return 0

    return main


def _closed_output() -> int:
    """The reader of our output, such as `head`, has gone; say nothing, also not at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def actions(stage: str, **mains: tuple[str, Callable[..., int]]) -> Callable[..., int]:
    """The `main` of a job that does several things: the first word names one.

    Each has a line for the list of them, and a `main` of its own.
    """
    rows = "\n".join(f"  {name:<13}{text}" for name, (text, _) in mains.items())
    usage = f"usage: cascade {stage} ACTION [flags]\n\n{rows}\n\ncascade {stage} ACTION --help"

    @ended_by_signals
    def main(argv: Sequence[str] | None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if not words or words[0] in ("-h", "--help"):
            print(usage)
            return 0 if words else 2
        if words[0] not in mains:
            known = cure(words[0], mains, cutoff=0.6)
            print(f"cascade {stage}: no action {words[0]!r}; {known}", file=sys.stderr)
            return 2
        return mains[words[0]][1](words[1:])

    return main


def stage_of(run: Callable[..., Any]) -> str:
    """The stage's name, from the module that holds `run`, also under `python -m`."""
    spec = getattr(sys.modules[run.__module__], "__spec__", None)
    return (spec.name if spec else run.__module__).rsplit(".", 1)[-1]


def parse(config_class: type[Config], argv: Sequence[str], stage: str = "STAGE") -> Config:
    """Build the config of a stage from `--config FILE` (repeatable) and flags."""
    import tyro

    flags, files = _split_config_files(argv)
    settings: dict[str, Any] = {}
    for file in files:
        mapping = read_yaml(file)
        _check_mapping(config_class, mapping, file)
        settings = _laid_over(settings, mapping)
    _refuse_lists(config_class, flags)
    return tyro.cli(
        config_class,
        default=_draft(config_class, settings, tyro.MISSING),
        args=flags,
        prog=f"cascade {stage} [--config FILE.yaml]...",
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def dump(config: Any) -> str:
    """The config as YAML that parses back to an equal object."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def show_error(error: Exception) -> None:
    """One box on stderr."""
    lines = textwrap.wrap(str(error), 92, break_long_words=False, break_on_hyphens=False)
    width = max(len(line) for line in lines or [""])
    body = "\n".join(f"│ {line.ljust(width)} │" for line in lines)
    print(f"╭─ error {'─' * max(width - 6, 1)}╮\n{body}\n╰{'─' * (width + 2)}╯", file=sys.stderr)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that safe YAML can hold them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config FILE` and `--config=FILE` out of the arguments."""
    flags, files, rest = [], [], iter(argv)
    for word in rest:
        if word == "--config":
            file = next(rest, None)
            if file is None:
                raise InputError("--config needs a file; write --config settings.yaml")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            flags.append(word)
    return flags, files


def _refuse_lists(config_class: Any, flags: Sequence[str], prefix: str = "") -> None:
    """Say of a list of groups, which has no flag, where it is set."""
    names = [word.partition("=")[0][2:] for word in flags if word.startswith("--")]
    given = {name.replace("-", "_") for name in names}
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            _refuse_lists(hint, flags, f"{prefix}{name}.")
        elif _listed_group(hint) and f"{prefix}{name}" in given:
            raise InputError(
                f"`{prefix}{name}` is a list of groups of settings, which no flag can hold; write "
                "it into a YAML file and give that with --config"
            )


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings as one; where both have a setting, that of `above`."""
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, dict) and isinstance(above.get(key), dict):
            merged[key] = _laid_over(value, above[key])
    return merged


def _draft(config_class: Any, mapping: dict[str, Any], missing: Any, base: Any = None) -> Any:
    """The dataclass filled from a checked mapping but not yet checking itself.

    Flags may still complete or correct it; `missing` marks what has neither value nor default.
    """
    hints = typing.get_type_hints(config_class)
    draft = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        value = missing if base is None else getattr(base, field.name)
        if base is None and field.default is not dataclasses.MISSING:
            value = field.default
        elif base is None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]):
            own = mapping.get(field.name, {})
            nested = None if value is missing else value
            value = _draft(hints[field.name], own, missing, nested)
        elif field.name in mapping and (group := _named_group(hints[field.name])):
            named = mapping[field.name]
            value = {name: _draft(group, own, missing) for name, own in named.items()}
        elif field.name in mapping and (group := _listed_group(hints[field.name])):
            value = tuple(_draft(group, own, missing) for own in mapping[field.name])
        elif field.name in mapping:
            value = _typed(mapping[field.name], hints[field.name])
        object.__setattr__(draft, field.name, value)
    return draft


def _named_group(hint: Any) -> Any:
    """The dataclass of a mapping from names to groups of settings, else none."""
    args = typing.get_args(hint)
    is_named = typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1])
    return args[1] if is_named else None


def _listed_group(hint: Any) -> Any:
    """The dataclass of a list of groups of settings, else none."""
    args = typing.get_args(hint)
    is_listed = typing.get_origin(hint) is tuple and dataclasses.is_dataclass(args[0])
    return args[0] if is_listed else None


def _typed(value: Any, hint: Any) -> Any:
    """A YAML value that fits the type, in the type: whole numbers as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _typed(value, next(arg for arg in args if _fits(value, arg)))
    if origin in (tuple, list):
        return tuple(_typed(item, args[0]) for item in value)
    return float(value) if hint is float else value


def read_yaml(file: str) -> dict[str, Any]:
    """The mapping in a YAML file; a missing or broken file, or a key that stands twice, is an
    `InputError`."""
    source = f"--config {file}"
    mapping = document_in(text_of(file, source), source)
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise InputError(f"{source}: holds no mapping of settings; write `name: value` lines")
    return mapping


def _check_mapping(
    config_class: type, mapping: dict[str, Any], source: str, prefix: str = ""
) -> None:
    """Refuse unknown keys, with the nearest right name, and values of a wrong type."""
    hints = typing.get_type_hints(config_class)
    names = {field.name for field in dataclasses.fields(config_class)}
    for key, value in mapping.items():
        if key not in names:
            known = cure(str(key), sorted(names), prefix)
            raise InputError(f"{source}: no setting `{prefix}{key}`; {known}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(
                    f"{source}: `{prefix}{key}` is a group of settings, not {value!r}; "
                    "indent its settings below it"
                )
            _check_mapping(typing.cast(type, hint), value, source, f"{prefix}{key}.")
        elif group := _named_group(hint):
            _check_named(group, value, source, f"{prefix}{key}")
        elif group := _listed_group(hint):
            _check_listed(group, value, source, f"{prefix}{key}")
        elif not _fits(value, hint):
            raise InputError(f"{source}: `{prefix}{key}` is {value!r}; it must be {_spoken(hint)}")


def _check_named(group: type, value: Any, source: str, key: str) -> None:
    """Refuse what is no mapping from names to groups of settings, or a group that cannot be."""
    if not isinstance(value, dict) or not all(isinstance(own, dict) for own in value.values()):
        raise InputError(
            f"{source}: `{key}` is {value!r}; it must be groups of settings, each below its name"
        )
    for name, own in value.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(
                f"{source}: `{key}` has the name {name!r}; use letters, digits and underscores"
            )
        _check_mapping(group, own, source, f"{key}.{name}.")


def _check_listed(group: type, value: Any, source: str, key: str) -> None:
    """Refuse what is no list of groups of settings, or a group that cannot be."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(own, dict) for own in value):
        raise InputError(f"{source}: `{key}` is {value!r}; it must be a list of groups of settings")
    names = {field.name for field in dataclasses.fields(group)}
    for index, own in enumerate(value):
        _check_mapping(group, own, source, f"{key}[{index}].")
        if missing := sorted(names - set(own)):
            raise InputError(f"{source}: `{key}[{index}].{missing[0]}` is missing; add it")


def build(config_class: type[Config], mapping: dict[str, Any], source: str) -> Config:
    """The dataclass from a mapping, such as the `args` of a Serve application, checked.

    A required setting that is missing is named.
    """
    _check_mapping(config_class, mapping, source)
    return _finished(_draft(config_class, mapping, dataclasses.MISSING), source)


def _finished(draft: Any, source: str, prefix: str = "") -> Any:
    """The dataclass of a draft, which now checks itself."""
    values = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
    for name, value in values.items():
        if value is dataclasses.MISSING:
            raise InputError(f"{source}: the setting `{prefix}{name}` is missing; add it")
        if dataclasses.is_dataclass(value):
            values[name] = _finished(value, source, f"{prefix}{name}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            values[name] = {
                key: _finished(own, source, f"{prefix}{name}.{key}.") for key, own in value.items()
            }
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            values[name] = tuple(
                _finished(own, source, f"{prefix}{name}[{index}].")
                for index, own in enumerate(value)
            )
    try:
        return type(draft)(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand for a setting of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (tuple, list):
        return isinstance(value, (list, tuple)) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spoken(hint: Any) -> str:
    """A type in the words of a user."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spoken(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, list):
        return f"a list, each {_spoken(args[0])}"
    words = {
        int: "a whole number",
        float: "a number (write 1.0e-3, not 1e-3)",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))
