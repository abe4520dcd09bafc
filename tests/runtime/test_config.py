"""Configurations: what is read from YAML, and what is said of mistakes."""

from typing import Annotated, Any

import pytest
from pydantic import Field, model_validator

from vrwkv.runtime.config import MAY_CHANGE, Positive, Range, Section, Text, check, differences, load_config
from vrwkv.runtime.errors import UserError


class Inner(Section):
    rate: Positive = 0.5
    name: Text = "x"
    deep: Annotated[int, MAY_CHANGE] = 1


class Outer(Section):
    count: Annotated[int, Field(ge=1), MAY_CHANGE]
    inner: Inner
    bounds: Range[float] | None = None
    flag: bool = False
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _small(self) -> "Outer":
        if self.count > 100:
            raise ValueError(f"count must be small, not {self.count}")
        return self


@pytest.fixture
def load(tmp_path):
    def load(text, *settings):
        (tmp_path / "x.yaml").write_text(text)
        return load_config(Outer, tmp_path / "x.yaml", settings)

    return load


def failure(load, text, *settings):
    with pytest.raises(UserError) as error:
        load(text, *settings)
    return str(error.value).splitlines()


def test_values(load):
    config = load("{count: 3, inner: {rate: 1e-3}, bounds: [1, 2.5], args: {x: 1E5, y: -.5e1, z: 1e-3x, w: 1:30}}")
    assert config == Outer(count=3, inner=Inner(rate=0.001), bounds=[1.0, 2.5], args=config.args)
    assert config.args == {"x": 100000.0, "y": -5.0, "z": "1e-3x", "w": 90}
    assert type(config.inner.rate) is float


def test_settings_override_in_order(load):
    config = load(
        "{count: 3, inner: {name: a}}", "count=4", "inner.name=b=c", "inner.rate=2e-1", "count=5", "args.x.y=[1]"
    )
    assert config == Outer(count=5, inner=Inner(name="b=c", rate=0.2), args={"x": {"y": [1]}})


def test_sections_that_the_file_does_not_have(load):
    assert load("count: 1", "inner.rate=2") == Outer(count=1, inner=Inner(rate=2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{count: true, inner: {}}", "config key count must be a valid integer, not True"),
        ("{count: 1.0, inner: {}}", "config key count must be a valid integer, not 1.0"),
        ("{count: '1', inner: {}}", "config key count must be a valid integer, not '1'"),
        ("{count: 1, inner: {rate: true}}", "config key inner.rate must be a valid number, not True"),
        ("{count: 1, inner: {rate: '1'}}", "config key inner.rate must be a valid number, not '1'"),
        ("{count: 1, inner: {rate: .inf}}", "config key inner.rate must be a finite number, not inf"),
        ("{count: 1, inner: {name: 3}}", "config key inner.name must be a valid string, not 3"),
        ("{count: 1, inner: {}, flag: 1}", "config key flag must be a valid boolean, not 1"),
        ("{count: 1, inner: 3}", "config key inner must be a valid dictionary, not 3"),
        ("{count: 1, inner: {}, bounds: [1]}", "config key bounds must have at least 2 items, not [1]"),
        ("{count: 1, inner: {}, bounds: [1, 2, 3]}", "config key bounds must have at most 2 items, not [1, 2, 3]"),
        ("{count: 1, inner: {}, bounds: [2, 1]}", "config key bounds must rise, not [2.0, 1.0]"),
        ("{count: 1, inner: {}, bounds: [1, x]}", "config key bounds[1] must be a valid number, not 'x'"),
        ("{count: 1, inner: {}, args: {1: 2}}", "config key args[1] must be a valid string, not 1"),
        ("{count: 101, inner: {}}", "count must be small, not 101"),
        ("{count: 1}", "config key 'inner' is missing"),
        ("{count: 1, inner: {}, cuont: 1}", "unknown config key 'cuont'; nearest: count"),
        ("{count: 1, inner: {}, rate: 1}", "unknown config key 'rate'; nearest: inner.rate"),
        ("{count: 1, inner: {rat: 1}}", "unknown config key 'inner.rat'; nearest: inner.rate, inner.name, inner"),
        ("{count: 1, inner: {}, zzz: 1}", "unknown config key 'zzz'"),
    ],
)
def test_mistakes(text, expected, load):
    assert failure(load, text) == [expected]


def test_all_mistakes_are_told_at_once(load):
    assert failure(load, "{count: 0, inner: {rate: 0, nmae: a}, flag: no!}") == [
        "config key count must be greater than or equal to 1, not 0",
        "config key inner.rate must be greater than 0, not 0",
        "unknown config key 'inner.nmae'; nearest: inner.name, inner.rate, inner.deep",
        "config key flag must be a valid boolean, not 'no!'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: [", "is not YAML: while parsing a flow node expected the node content"),
        ("{count: 1, count: 2}", "is not YAML: key 'count' stands twice"),
        ("{count: 1, inner: {rate: 1, rate: 2}}", "is not YAML: key 'rate' stands twice"),
        ("{count: 1, inner: {<<: *absent}}", "is not YAML: found undefined alias"),
        ("? [1]\n: 2", "is not YAML: while constructing a mapping"),
        ("!!python/object/apply:os.mkdir [made]", "is not YAML: could not determine a constructor"),
        ("[" * 5000, "is not YAML: "),
        ("count: 1\x01", "is not YAML: "),
        ("just words", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
    ],
)
def test_files_that_are_no_config(text, expected, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = failure(load, text)
    assert line.startswith(f"config {tmp_path / 'x.yaml'} {expected}")
    assert not (tmp_path / "made").exists()  # a file cannot run code


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read config .*absent.yaml: No such file or directory$"):
        load_config(Outer, tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_config(Outer, tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(Outer, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("count", "--set takes key=value, not 'count'"),
        ("=1", "unknown config key ''"),
        ("count.x=1", "unknown config key 'count.x'; nearest: count"),
        ("count.x.y=1", "unknown config key 'count.x.y'"),
        ("count=[", "--set count=[: the value is not YAML (while parsing a flow node)"),
        ("count=", "config key count must be a valid integer, not None"),
        ("inner=3", "config key inner must be a valid dictionary, not 3"),
        ("args={a: 1, a: 2}", "--set args={a: 1, a: 2}: the value is not YAML (key 'a' stands twice)"),
    ],
)
def test_settings_that_are_refused(setting, expected, load):
    (line,) = failure(load, "{count: 1, inner: {}}", setting)
    assert line.startswith(expected)


def test_subject_of_messages():
    with pytest.raises(UserError) as error:
        check(Inner, {"rate": 0, "x": 1}, "option")
    assert str(error.value) == "option rate must be greater than 0, not 0\nunknown option 'x'"
    with pytest.raises(UserError, match=r"^entry 'count' is missing\n"):
        check(Outer, {}, "entry")


def test_differences():
    old = Outer(count=1, inner=Inner(deep=1), bounds=[1.0, 2.0])
    assert differences(old, Outer(count=2, inner=Inner(deep=2), bounds=[1, 2])) == []
    new = Outer(count=2, inner=Inner(rate=0.1, name="y"), flag=True)
    assert differences(old, new) == [
        "inner.rate was 0.5, is 0.1",
        "inner.name was 'x', is 'y'",
        "bounds was [1.0, 2.0], is None",
        "flag was False, is True",
    ]
    both = Outer(count=2, inner=Inner(deep=2, rate=0.1))
    assert differences(old, both, may_change=True) == ["count was 1, is 2", "inner.deep was 1, is 2"]


def test_configs_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Inner().rate = 1.0


def test_base(tmp_path):
    """Keys of a file go before those of its base, section by section; settings go before both."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("{a: {x: 1}, inner: {b: 2, c: 3}, l: 1}")
    (tmp_path / "x.yaml").write_text("{base: folder/base.yaml, a: 1, inner: {c: 4, d: 6}, l: {y: 3}}")

    class Inner(Section):
        b: int
        c: int
        d: int

    class Outer(Section):
        a: int
        inner: Inner
        l: dict[str, int]  # noqa: E741

    assert load_config(Outer, tmp_path / "x.yaml", ["inner.d=5"]).model_dump() == {
        "a": 1,
        "inner": {"b": 2, "c": 4, "d": 5},
        "l": {"y": 3},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: 3", "base must be the name of a file, not 3"),
        ("base: absent.yaml", "cannot read config .*absent.yaml"),
        ("base: x.yaml", "x.yaml is the base of .*x.yaml and must not have one itself"),
    ],
)
def test_bases_that_cannot_be_used(text, expected, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        load_config(Section, tmp_path / "x.yaml")
