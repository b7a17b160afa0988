"""Our own secrets: whatever an endpoint or a server makes of them, they reach no file and no screen."""
import json

LEAST = 8  # characters; shorter ones are words too ("test"), which would be taken out of everything that is said
HIDDEN = "***"


class Secrets:
    """Values that are replaced in whatever is kept or shown."""

    def __init__(self) -> None:
        self._values: list[str] = []

    def add(self, value: str) -> None:
        """Keep `value` out of everything from now on."""
        if len(value) >= LEAST and value not in self._values:
            self._values.append(value)
            self._values.sort(key=len, reverse=True)  # one may begin with another

    def hide(self, text: str) -> str:
        """Return `text` without them, also as JSON spells them."""
        for value in self._values:
            if value in text:
                text = text.replace(value, HIDDEN)
            spelt = json.dumps(value)[1:-1]
            if spelt != value and spelt in text:
                text = text.replace(spelt, HIDDEN)
        return text


OWN = Secrets()
hide = OWN.hide
