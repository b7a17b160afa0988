"""Tables whose keys are typed, described and checked: what a dataclass library would be, for Python 3.8 without one."""
import difflib
import math
import re
from typing import (
    Any,
    ClassVar,
    Dict,
    Iterable,
    List,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

REQUIRED: Any = object()
SHOWN = 60  # characters of a wrong value
Kind = TypeVar("Kind", bound="Table")


class Misfit(ValueError):
    """A value that does not fit.

    Attributes:
        where: the keys that lead to it.
        fault: what is wrong with it, and where it helps what would be right.
    """

    def __init__(self, where: Iterable[Any], fault: str) -> None:
        self.where, self.fault = tuple(where), fault
        super().__init__(f"{'.'.join(map(str, self.where))}: {fault}" if self.where else fault)


class Spec(NamedTuple):
    """What is known of a key beside its type."""
    description: str
    default: Any
    least: Optional[float]
    most: Optional[float]
    pattern: str
    table_key: str


def key(description: str,
        default: Any = REQUIRED,
        least: Optional[float] = None,
        most: Optional[float] = None,
        pattern: str = "",
        table_key: str = "") -> Any:
    """Return the specification of a table's key; without a `default` it must be given.

    Args:
        description: a sentence for editors.
        default: its value where it is absent.
        least, most: bounds of a number, both allowed.
        pattern: regular expression that the whole of a text must match.
        table_key: its name in the table, where that is no name for Python.
    """
    return Spec(description, default, least, most, pattern, table_key)


class Table:
    """Base of the tables. Frozen; equal where all values are; a key that is not known is a fault, no silence."""
    SPECS: ClassVar[Dict[str, Spec]] = {}
    TYPES: ClassVar[Dict[str, Any]] = {}
    HIDDEN: ClassVar[Tuple[str, ...]] = ()  # keys that no file gives

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Spec)}
        for name in own:
            delattr(cls, name)
        cls.SPECS = {**cls.SPECS, **own}
        hints = get_type_hints(cls)
        cls.TYPES = {name: hints[name] for name in cls.SPECS}

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(self._fitted(values, (), frozenset()))
        self.validate(())

    def validate(self, where: Tuple[Any, ...]) -> None:
        """Raise a `Misfit` where the values do not fit each other; `where` leads to this table."""

    @classmethod
    def read(cls: Type[Kind], table: Any, where: Tuple[Any, ...] = (), other_keys: Iterable[str] = ()) -> Kind:
        """Return the table made of parsed TOML or JSON.

        Args:
            table: the mapping.
            where: keys that lead to it, for messages.
            other_keys: keys that are not this class's and are passed over.

        Raises:
            Misfit: a key is missing, unknown, or its value does not fit.
        """
        if not isinstance(table, Mapping):
            raise Misfit(where, f"{shown(table)} is no table")
        made = cls.__new__(cls)
        given = dict(table)
        for name, spec in cls.SPECS.items():
            if spec.table_key in given:
                given[name] = given.pop(spec.table_key)
        made.__dict__.update(cls._fitted(given, where, frozenset(other_keys)))
        made.validate(where)
        return made

    @classmethod
    def _fitted(cls, values: Mapping[str, Any], where: Tuple[Any, ...], others: "frozenset[str]") -> Dict[str, Any]:
        for name in values:
            if name not in cls.SPECS and name not in others:
                near = difflib.get_close_matches(str(name), cls.SPECS, n=1, cutoff=0.6)
                raise Misfit((*where, plain(name)), f"no such key; did you mean {near[0]}?"
                             if near else f"no such key; the keys are {', '.join(cls.SPECS)}")
        found = {}
        for name, spec in cls.SPECS.items():
            here = (*where, spec.table_key or name)
            if name in values:
                found[name] = fit(cls.TYPES[name], values[name], here, spec)
            elif spec.default is REQUIRED:
                raise Misfit(here, f"missing: {spec.description}")
            else:
                found[name] = spec.default
        return found

    def replaced(self: Kind, **changes: Any) -> Kind:
        """Return a copy with other values; they are checked."""
        return type(self)(**{**self.__dict__, **changes})

    def to_json(self, defaults: bool = True) -> Dict[str, Any]:
        """Return the table as values of JSON; without `defaults` only what differs from them."""
        return {
            spec.table_key or name: as_json(self.__dict__[name], defaults)
            for name, spec in self.SPECS.items() if defaults or self.__dict__[name] != spec.default
        }

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; use replaced({name}=…)")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.to_json(defaults=False).items())
        return f"{type(self).__name__}({values})"


def as_json(value: Any, defaults: bool) -> Any:
    """Return `value` with tables and tuples as what JSON has."""
    if isinstance(value, Table):
        return value.to_json(defaults)
    if isinstance(value, Mapping):
        return {name: as_json(one, defaults) for name, one in value.items()}
    return [as_json(one, defaults) for one in value] if isinstance(value, (tuple, list)) else value


def plain(text: Any) -> str:
    """Return a key as it may stand in a message: escaped and cut unless it is a plain word."""
    return text if isinstance(text, str) and re.fullmatch(r"[\w-]{1,60}", text, re.ASCII) else shown(text)


def shown(value: Any) -> str:
    """Return `value` for a message: on one line, control characters escaped, cut."""
    if isinstance(value, (Mapping, list, tuple)):
        return "a table" if isinstance(value, Mapping) else "a list"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**SHOWN else f"a number above 10^{SHOWN}"
    return text if len(text) <= SHOWN else text[:SHOWN - 1] + "…"


def fit(kind: Any, value: Any, where: Tuple[Any, ...], spec: Optional[Spec] = None) -> Any:
    """Return `value` as a value of the type `kind`.

    Raises:
        Misfit: it is none.
    """
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union:  # Optional, the only one in use
        return None if value is None else fit(inner[0], value, where, spec)
    if origin is Literal:
        if value not in inner or not isinstance(value, str):
            raise Misfit(where, f"{shown(value)} is none of {', '.join(inner)}")
        return value
    if origin is tuple:
        return _tuple(inner, value, where, spec)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise Misfit(where, f"{shown(value)} is no table")
        return {str(name): fit(inner[1], one, (*where, plain(name)), spec) for name, one in value.items()}
    if issubclass(kind, Table):
        return value if isinstance(value, kind) else kind.read(value, where)
    return _scalar(kind, value, where, spec)


def _tuple(inner: Tuple[Any, ...], value: Any, where: Tuple[Any, ...], spec: Optional[Spec]) -> Tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise Misfit(where, f"{shown(value)} is no list")
    if inner[-1] is Ellipsis:
        return tuple(fit(inner[0], one, (*where, number), spec) for number, one in enumerate(value))
    if len(value) != len(inner):
        raise Misfit(where, f"give {len(inner)} values, not {len(value)}")
    return tuple(fit(kind, one, (*where, number), spec) for number, (kind, one) in enumerate(zip(inner, value)))


NAMES = {bool: "neither true nor false", int: "no whole number", float: "no number", str: "no text"}


def _scalar(kind: Any, value: Any, where: Tuple[Any, ...], spec: Optional[Spec]) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int),
        float: number,
        str: isinstance(value, str)
    }[kind]
    if not fits:
        raise Misfit(where, f"{shown(value)} is {NAMES[kind]}")
    if number:
        if not -2**63 <= value < 2**63 or not math.isfinite(value):  # NaN compares as neither
            raise Misfit(where, f"{shown(value)} is no number that is used here; give one below 2^63")
        if spec and spec.least is not None and value < spec.least:
            raise Misfit(where, f"{shown(value)} is below {spec.least:g}")
        if spec and spec.most is not None and value > spec.most:
            raise Misfit(where, f"{shown(value)} is above {spec.most:g}")
        return float(value) if kind is float else value
    if spec and spec.pattern and not re.fullmatch(spec.pattern, value):
        raise Misfit(where, f"{shown(value)} does not match {spec.pattern}")
    return value


def schema(root: Type[Table], title: str, names: str) -> Dict[str, Any]:
    """Return the JSON schema (draft 7, which TOML's editors read) of a file whose tables are `root`'s.

    Args:
        root: what each of the file's tables is.
        title: of the schema.
        names: pattern of the tables' names.
    """
    definitions: Dict[str, Any] = {}
    reference = _schema_of(root, definitions, None)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": title,
        "type": "object",
        "propertyNames": {
            "pattern": f"^({names})$"
        },
        "additionalProperties": reference,
        "definitions": definitions,
    }


def _schema_of(kind: Any, definitions: Dict[str, Any], spec: Optional[Spec]) -> Dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin is Union:
        return _schema_of(inner[0], definitions, spec)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": _schema_of(inner[0], definitions, spec)}
        items = [_schema_of(one, definitions, spec) for one in inner]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(inner[1], definitions, spec)}
    if issubclass(kind, Table):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # its place in the order
            definitions[kind.__name__] = _table_schema(kind, definitions)
        return {"$ref": f"#/definitions/{kind.__name__}"}
    found: Dict[str, Any] = {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]}
    if spec and kind in (int, float):
        found.update({
            name: bound
            for name, bound in (("minimum", spec.least), ("maximum", spec.most)) if bound is not None
        })
    if spec and spec.pattern and kind is str:
        found["pattern"] = f"^({spec.pattern})$"
    return found


def _table_schema(kind: Type[Table], definitions: Dict[str, Any]) -> Dict[str, Any]:
    properties: Dict[str, Any] = {}
    required: List[str] = []
    for name, spec in kind.SPECS.items():
        if name in kind.HIDDEN:
            continue
        found = _schema_of(kind.TYPES[name], definitions, spec)
        if "$ref" in found:  # beside which draft 7 reads nothing
            found = {"allOf": [found]}
        found["description"] = spec.description
        if spec.default is REQUIRED:
            required.append(spec.table_key or name)
        elif spec.default not in (None, (), {}, ""):
            found["default"] = as_json(spec.default, False)
        properties[spec.table_key or name] = found
    return {
        "type": "object",
        "description": (kind.__doc__ or "").splitlines()[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
