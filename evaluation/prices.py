"""What tokens cost: a table that the user gives. There is none built in, because prices change and vary by contract."""
from pathlib import Path

import environment_rows
from evaluation import foreign
from evaluation.problems import Misuse, reason

Price = dict[str, float]
KEYS = ("input", "output", "cached")
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
        path = Path(file)
        tables = foreign.loads(foreign.read_text(path)) if path.suffix == ".json" else environment_rows.read_toml(path)
    except (OSError, ValueError) as error:
        raise Misuse(
            f"--prices {file} cannot be read: {reason(error)}; name a TOML or JSON file with a table a model") from None
    price = tables.get(model) if isinstance(tables, dict) else None
    if price is None:
        return None
    try:
        found = {key: value for key, value in price.items() if type(value) in (int, float) and 0 <= value < MOST}
        if not {"input", "output"} <= price.keys() <= found.keys() <= set(KEYS):
            raise ValueError
        return {key: float(value) for key, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise Misuse(f"--prices {file}: {model} needs input and output, and may have cached, and nothing else: numbers "
                     "of at least 0 for a million tokens") from None
