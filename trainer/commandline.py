"""The command line of both doors, made from a settings model: flags, help, recipe, and mistakes told in one sentence.

    recipe.yaml --strings--+
                           +--> one check by pydantic --> frozen settings
    --name value --strings-+

A recipe's values are read as text, exactly like flags, so `no`, `1e-4` and `null` mean the same in both places.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from preprocessing.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)
NULLS = ("null", "~", "")
METAVARS = {bool: "{true,false}", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
LONGEST_QUOTE = 60  # characters of a wrong value that a message repeats


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


class _RecipeLoader(yaml.BaseLoader):
    """Reads every scalar as a string and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)  # first, for it refuses keys that are not text
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return mapping


def run(door: Callable[[list[str]], None]) -> int:
    """Call a door with the program's arguments and turn how it ends into an exit code: 0, 2 or 130.

    A UserError is printed as one line on stderr; a bug keeps its traceback.
    """
    quiet_libraries()
    try:
        door(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """What must be said before torch and transformers are loaded."""
    # Threads that spin as they wait made training on a busy machine 40 times slower, and those that sleep at once made
    # it 2.4 times slower on a quiet one. So GNU's OpenMP, which torch brings for Linux, spins for a tenth of a
    # millisecond: on a quiet machine no worse than spinning, on a busy one no worse than sleeping.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Pictures are handled without torchvision, and transformers says so at every start.
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_not_about_torchvision)


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


def build_parser(model: type[BaseModel], prog: str, description: str, recipe: bool = False) -> Parser:
    """A parser with one flag a field of `model`, in one help group a class; with `recipe`, a YAML may come first."""
    usage = f"{prog} [recipe.yaml] [--name value ...]" if recipe else f"{prog} [--name value ...]"
    parser = Parser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if recipe:
        parser.add_argument("recipe", nargs="?", type=Path, default=None, help="YAML with settings; flags override it.")
    for owner, fields in _by_class(model):
        group = parser.add_argument_group((owner.__doc__ or owner.__name__).splitlines()[0].rstrip("."))
        for name, field in fields.items():
            _add_flag(group, name, field)
    return parser


def read(parser: Parser, model: type[Settings], argv: list[str]) -> Settings:
    """The settings that the recipe and the flags in `argv` give; flags win. Raises UserError for any mistake."""
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise UserError(f"{word.partition('=')[0]} is no setting{_hint(word, model, '--')}")
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is not understood: settings are given as --name value; see {parser.prog} --help"
        )
    flags = vars(given)
    recipe = flags.pop("recipe", None)
    values = read_recipe(recipe, model) if recipe else {}
    places = {name: f"{recipe}: {name}" for name in values} | {name: f"--{name}" for name in flags}
    # A flag that takes several values gives a list, which cannot itself say null.
    flags = {name: "null" if value == ["null"] else value for name, value in flags.items()}
    values |= {name: _null(model.model_fields[name], value) for name, value in flags.items()}
    return check(model, values, places)


def read_recipe(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The values in a YAML file; see `parse_recipe`. Raises UserError for what cannot be read."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read ({error.strerror}): give the path of a YAML file") from error
    return parse_recipe(text, str(path), model)


def parse_recipe(text: str | bytes, place: str, model: type[BaseModel]) -> dict[str, Any]:
    """The values in YAML or JSON, as text, its keys checked against `model`; `place` is how mistakes are named."""
    try:
        values = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{line}: {getattr(error, 'problem', None) or 'this is no YAML'}") from error
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply: give lines of the form name: value") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{place} should hold lines of the form name: value")
    values = getattr(model, "flattened", dict)(values)
    for name in values:
        if name not in model.model_fields:
            raise UserError(f"{place}: {name} is no setting{_hint(name, model)}")
    return {name: _null(model.model_fields[name], value) for name, value in values.items()}


def check(model: type[Settings], values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Settings:
    """`values` as settings; a UserError names each wrong one by its place (flag or recipe), or else by its name."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        told = "; ".join(_told(one, model, places or {}) for one in error.errors(include_url=False))
        raise UserError(told) from error


def _told(error: ErrorDetails, model: type[BaseModel], places: Mapping[str, str]) -> str:
    """One of pydantic's errors in words."""
    message = error["msg"].removeprefix("Value error, ").partition(", unable to ")[0]
    if not error["loc"]:
        return message
    name, (number, *inside) = str(error["loc"][0]), error["loc"][1:] or (0,)
    if message.startswith(f"{name}: "):
        return message
    if inside:  # of an object in a list
        field = ".".join(map(str, inside))
        place = number + 1 if isinstance(number, int) else number
        return f"{places.get(name, name)} {place}: {field}: {message.removeprefix('Input ')}"
    if error["type"] == "missing":
        return (
            f"{name} is missing: give --{name} {_metavar(model.model_fields[name].annotation)} or put it in the recipe"
        )
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting{_hint(name, model)}"
    quote = repr(error["input"])
    if len(quote) > LONGEST_QUOTE:
        quote = quote[:LONGEST_QUOTE] + "..."
    return f"{places.get(name, name)} {message.removeprefix('Input ')}, not {quote}"


def _hint(word: str, model: type[BaseModel], prefix: str = "") -> str:
    """The nearest setting's name as the end of a sentence."""
    near = difflib.get_close_matches(word.strip("-").partition("=")[0], model.model_fields, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists them all"


def _null(field: FieldInfo, value: Any) -> Any:
    """None where the text says null and the field takes it."""
    return None if _nullable(field.annotation) and isinstance(value, str) and value in NULLS else value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _nullable(annotation: Any) -> bool:
    return types.NoneType in _alternatives(annotation)


def _plain(annotation: Any) -> Any:
    """The annotation without None: `int | None` -> int."""
    return next(one for one in _alternatives(annotation) if one is not types.NoneType)


def _metavar(annotation: Any) -> str:
    plain = _plain(annotation)
    if get_origin(plain) is Literal:
        return "{" + ",".join(map(str, get_args(plain))) + "}"
    if get_origin(plain) is tuple:
        return METAVARS.get(get_args(plain)[0], "FOLDER_OR_JSON")
    return METAVARS[plain]


def _by_class(model: type[BaseModel]) -> Iterator[tuple[type, dict[str, FieldInfo]]]:
    """The fields of `model` by the class that they were written in, base classes first."""
    shown: set[str] = set()  # a class may change what one that it is made from says of a field
    for owner in sorted(model.__mro__, key=lambda one: len(one.__mro__)):
        own = inspect.get_annotations(owner).keys() - shown
        fields = {name: field for name, field in model.model_fields.items() if name in own}
        shown |= own
        if fields:
            yield owner, fields


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    plain = _plain(field.annotation)
    options: dict[str, Any] = {}
    if plain is bool:
        options = {"nargs": "?", "const": "true"}  # --resume alone is --resume true
    elif get_origin(plain) is tuple:
        options = {"nargs": "*"}
    default = "required" if field.is_required() else f"default: {_shown(field.default)}"
    text = f"{field.description or ''} ({default})".strip().replace("%", "%%")
    group.add_argument(f"--{name}", metavar=_metavar(field.annotation), help=text, **options)


def _shown(default: Any) -> str:
    """A default as one would type it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default) or '""'
