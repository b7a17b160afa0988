"""Read files of rows, and say what keeps a row's server from starting."""
import difflib
import os
import re
import stat
from typing import Any, Dict, Iterable, List, Mapping, Optional

from environment_rows.row import Environment, Folder, Row
from environment_rows.typed import Misfit, plain

NAME = r"[a-z0-9]+([-_][a-z0-9]+)*"
TOML_BYTES, TOML_DEPTH = 1 << 20, 100  # a file that somebody writes by hand
TOO_LONG, TOO_DEEP = f"it has more than {TOML_BYTES >> 20} MiB", f"it is nested deeper than {TOML_DEPTH} levels"
PART = r"""(?:(?<![\w-])[\w-]+|"[^"\n]*"|'[^'\n]*')"""
LONG_KEY = re.compile(rf"{PART}(?:[ \t]*\.[ \t]*{PART}){{{TOML_DEPTH}}}")


def read_toml(path: Any) -> Dict[str, Any]:
    """Return the tables of the TOML file `path`.

    Raises:
        ValueError: it is no TOML, or no regular file (a pipe would hang), or one that `toml_tables` refuses; one line.
        OSError: it cannot be read.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(TOML_BYTES + 1)
    if len(data) > TOML_BYTES:
        raise ValueError(TOO_LONG)
    return toml_tables(data.decode("utf-8-sig"))


def toml_tables(text: str) -> Dict[str, Any]:
    """Return the tables in a TOML text.

    Raises:
        ValueError: it is no TOML; or longer than TOML_BYTES, nested deeper than TOML_DEPTH, or has a key of more parts,
            for which the time to read it grows with the square; one line.
    """
    import tomllib  # not in the Pythons of the servers, which get their row as JSON
    if len(text) > TOML_BYTES:
        raise ValueError(TOO_LONG)
    if LONG_KEY.search(text):
        raise ValueError(TOO_DEEP)
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level: List[Any] = [tables]
    for _ in range(TOML_DEPTH + 1):
        level = [one for one in level if isinstance(one, (list, dict))]
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, (list, dict)) for one in level):
        raise ValueError(TOO_DEEP)
    return tables


def named(name: str, table: Any) -> Mapping[str, Any]:
    """Return the `table` of a file with the name that it has there.

    Raises:
        Misfit: it is no row.
    """
    if not isinstance(table, Mapping):
        raise Misfit((), f"{plain(name)} is no table; a row begins with [{plain(name)}]")
    if not re.fullmatch(NAME, name):
        raise Misfit((),
                     f"{name!r} names an image, a service and folders: lower-case letters and digits, with single - "
                     "or _ between them")
    if "name" in table:
        raise Misfit((name, "name"), "the table's own name is the row's; leave the key out")
    return {"name": name, **table}


def row(name: str, table: Any) -> Row:
    """Return what playing needs of a row; keys that only servers need may be missing, unknown ones may not.

    Raises:
        Misfit: it does not fit.
    """
    return Row.read(named(name, table), (name, ), Environment.SPECS)


def environment(name: str, table: Any) -> Environment:
    """Return the whole row.

    Raises:
        Misfit: it does not fit.
    """
    return Environment.read(named(name, table), (name, ))


def environments(tables: Mapping[str, Any]) -> Dict[str, Environment]:
    """Return the rows of parsed `tables` by name.

    Raises:
        Misfit: one does not fit, or two have one port.
    """
    found = {name: environment(name, table) for name, table in tables.items()}
    ports: Dict[int, str] = {}
    for one in found.values():
        if one.port in ports:
            raise Misfit((one.name, "port"), f"{one.port} is the port of {ports[one.port]} too")
        ports[one.port] = one.name
    return found


def near(name: str, known: Iterable[str]) -> str:
    """Return what to say to somebody who named a row that is not among `known`."""
    known = list(known)
    found = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"choose one of {', '.join(known)}"


def refusal(one: Environment,
            data: Folder,
            environ: Mapping[str, str],
            understood: bool,
            where: str,
            agree: str = "pass --i-understand") -> Optional[str]:
    """Return why the row's server must not start yet, and the remedy; None where nothing is missing.

    Args:
        one: the row.
        data: its data folder.
        environ: the variables that it would get.
        understood: the user agreed to what it does.
        where: what the message calls the data folder.
        agree: what the message says one does to agree.
    """
    missing_data = one.missing_data(data)
    if missing_data:
        how = missing_data[0].how or f"run `invoke env.data --env {one.name}`"
        return f"{one.name} needs {missing_data[0].path} in {where}: {how}"
    missing_keys = one.missing_keys(environ)
    if missing_keys:
        names = ", ".join(missing.name for missing in missing_keys)
        return f"{one.name} needs {names} in the environment or in .env; {missing_keys[0].name} is: {missing_keys[0].how}"
    if one.consent and not understood:
        return f"{one.consent}; {agree} to go on"
    return None
