"""What tokens cost: a table that the user gives. There is none built in, because prices change and vary by contract."""
from pathlib import Path

from evaluation import foreign
from evaluation.problems import Misuse, reason

Price = dict[str, float]
MOST = 1e12  # for a million tokens, in any currency


def read_price(file: str, model: str) -> Price | None:
    """Return the price of `model` in a TOML or JSON file; None where no file is given or the model is not in it.

    A table a model, for a million tokens: `["gpt-x"] input = 0.15, output = 0.6, cached = 0.075` (cached is optional).

    Raises:
        Misuse: the file cannot be read so.
    """
    if not file:
        return None
    try:
        text = foreign.read_text(Path(file))
        tables = foreign.loads(text) if file.endswith(".json") else foreign.toml_loads(text)
    except (OSError, ValueError) as error:
        raise Misuse(
            f"--prices {file} cannot be read: {reason(error)}; name a TOML or JSON file with a table a model") from None
    price = tables.get(model) if isinstance(tables, dict) else None
    if price is None:
        return None
    try:
        found = {key: float(price[key]) for key in ("input", "output", "cached") if key in price or key != "cached"}
        if not all(0 <= value < MOST for value in found.values()):
            raise ValueError
        return found
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Misuse(
            f"--prices {file}: {model} needs input and output, numbers of at least 0 for a million tokens") from None
