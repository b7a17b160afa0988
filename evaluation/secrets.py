"""Our own secrets: whatever an endpoint or a server makes of them, they reach no file and no screen."""
import json
import re
from typing import Any

LEAST = 8  # characters; shorter ones are words too ("test"), which would be taken out of everything that is said
HIDDEN = "***"
MARKS = ("\\u", "\\U", "\\x", "\\X", "\\/", "\\\\", "%", "&", "+")  # of what is written in another way
NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}  # in HTML


class Secrets:
    """Values that are replaced in whatever is kept or shown."""

    def __init__(self) -> None:
        self._values: list[str] = []
        self._spelt: dict[str, re.Pattern[str]] = {}

    def add(self, value: str) -> None:
        """Keep `value` out of everything from now on."""
        if len(value) >= LEAST and value not in self._values:
            self._values.append(value)
            self._values.sort(key=len, reverse=True)  # one may begin with another
            self._spelt[value] = re.compile("".join(map(_spellings, value)))

    def hide(self, text: str) -> str:
        """Return `text` without them, also as JSON, URLs or HTML may spell them."""
        for value in self._values:
            if value in text:
                text = text.replace(value, HIDDEN)
            spelt = json.dumps(value)[1:-1]
            if spelt != value and spelt in text:
                text = text.replace(spelt, HIDDEN)
            if any(mark in text for mark in MARKS):
                text = self._spelt[value].sub(HIDDEN, text)
        return text

    def hide_in(self, value: Any) -> Any:
        """Return `value`, of JSON, without them in its texts; in its JSON a mark of an escape could go with one."""
        if not self._values:
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list | tuple):
            return [self.hide_in(one) for one in value]
        if isinstance(value, dict):
            return {self.hide(key) if isinstance(key, str) else key: self.hide_in(one) for key, one in value.items()}
        return value


def _spellings(character: str) -> str:
    """Return a pattern of the ways to write a character: after backslashes, by its number, in hexadecimal digits."""
    number = ord(character)
    units = character.encode("utf-16-be", "surrogatepass")
    escapes = "".join(rf"\\{{1,8}}u{units[at:at + 2].hex()}" for at in range(0, len(units), 2))
    percents = "".join(f"%(?:25){{0,4}}{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
    ways = [f"(?i:{escapes})", f"(?i:{percents})", f"(?i:&#(?:0{{0,8}}{number}|x0{{0,8}}{number:x});)"]
    if number < 0x100:
        ways.append(rf"(?i:\\{{1,8}}x{number:02x})")
    if character == " ":
        ways.append(r"\+")
    if character in NAMED:
        ways.append(f"&{NAMED[character]};")
    ways.append(rf"\\{{0,8}}{re.escape(character)}")  # last: it is the beginning of some of the others
    return f"(?:{'|'.join(ways)})"


OWN = Secrets()
hide, hide_in = OWN.hide, OWN.hide_in
