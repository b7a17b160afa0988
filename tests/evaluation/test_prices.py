"""Price files."""
import pytest

from evaluation.problems import Misuse


@pytest.mark.parametrize("price", ["input = nan\noutput = 1", "input = 1\noutput = -1", "input = 1\noutput = inf"])
def test_a_price_that_is_none_is_refused(price, tmp_path):
    from evaluation.prices import read_price
    (tmp_path / "p.toml").write_text(f"[m]\n{price}\n")
    with pytest.raises(Misuse, match="numbers of at least 0"):
        read_price(str(tmp_path / "p.toml"), "m")
