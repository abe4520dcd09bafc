"""Configurations: sections with types and ranges, read from YAML, with all mistakes of a file told at once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vrwkv.runtime.errors import UserError, first_line, nearest


class Section(BaseModel):
    """A mapping of keys. Unknown keys are refused, and values are not converted: true is no number, "1" neither."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _MayChange:
    """Marks a key that may differ between a run and its resumption."""


MAY_CHANGE = _MayChange()


def _rising(values: list[float]) -> list[float]:
    if values[0] > values[1]:
        raise ValueError(f"must rise, not {values}")
    return values


T = TypeVar("T")
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Range = Annotated[list[T], Field(min_length=2, max_length=2), AfterValidator(_rising)]

S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(schema: type[S], path: str | Path, settings: Sequence[str] = ()) -> S:
    """Reads a YAML file and overrides it.

    Args:
        schema: What the file must hold.
        path: YAML file. Its key `base` may name another, relative to it, whose keys it changes or adds to; that one has
            no base.
        settings: `dotted.key=value` strings; the value is parsed as YAML.

    Raises:
        UserError: no such file, no YAML; or a line for each unknown or missing key and each value that is refused.
    """
    content = _read(path)
    if "base" in content:
        base = content.pop("base")
        if not isinstance(base, str):
            raise UserError(f"config {path}: base must be the name of a file, not {base!r}")
        below = _read(Path(path).parent / base)
        if "base" in below:
            raise UserError(f"config {Path(path).parent / base} is the base of {path} and must not have one itself")
        content = _merged(below, content)
    for setting in settings:
        _override(content, setting, schema)
    return check(schema, content)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of keys to values")
    return content


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, mapping by mapping."""
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys()
            if isinstance(below[key], dict) and isinstance(above[key], dict)}  # fmt: skip
    return {**below, **above, **both}


def check(schema: type[S], content: Mapping[Any, Any], subject: str = "config key") -> S:
    """`content` as a `schema`.

    Args:
        schema: What must be held.
        content: What is given.
        subject: What messages call a key.

    Raises:
        UserError: a line for each unknown or missing key and each value that is refused.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(_problem(dict(each), schema, subject) for each in error.errors())) from None


def differences(old: S, new: S, may_change: bool = False, prefix: str = "") -> list[str]:
    """The keys, as `key was A, is B`, that differ between two configurations: those that must not between a run and its
    resumption, or those that may."""
    found = []
    for name, field in type(new).model_fields.items():
        one, other = getattr(old, name), getattr(new, name)
        if isinstance(other, Section):
            found += differences(one, other, may_change, f"{prefix}{name}.")
        elif one != other and (MAY_CHANGE in field.metadata) == may_change:
            found.append(f"{prefix}{name} was {one!r}, is {other!r}")
    return found


def _override(content: dict[str, Any], setting: str, schema: type[Section]) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set takes key=value, not {setting!r}")
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"unknown config key {key!r}{nearest(key, _keys(schema))}")
    try:
        content[last] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {setting}: the value is not YAML ({first_line(error)})") from error


def _keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _problem(error: dict[str, Any], schema: type[Section], subject: str) -> str:
    """One of pydantic's errors as a line."""
    key = ".".join(map(str, error["loc"])).replace(".[key]", "")
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    if error["type"] == "extra_forbidden":
        return f"unknown {subject} {key!r}{_hint(key, list(_keys(schema)))}"
    if error["type"] == "missing":
        return f"{subject} {key!r} is missing"
    if error["type"] == "value_error":  # from a validator of ours, which says what was given
        text = error["msg"].removeprefix("Value error, ")
        return f"{subject} {key} {text}" if key else text
    text = re.sub(r"^\w+ should ", "must ", error["msg"])
    text = re.sub(r" after validation, not \d+$| or instance of \w+$", "", text)
    return f"{subject} {key} {text}, not {error['input']!r}"


def _hint(key: str, every: list[str]) -> str:
    same_leaf = [other for other in every if other.rpartition(".")[2] == key]
    return f"; nearest: {', '.join(same_leaf)}" if same_leaf else nearest(key, every)
