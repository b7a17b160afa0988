"""Price files."""
import pytest

from evaluation.problems import Misuse


@pytest.mark.parametrize("price", [
    "input = nan\noutput = 1", "input = 1\noutput = -1", "input = 1\noutput = inf", "input = true\noutput = 1", "input = '1'\noutput = 1", "input = 1",
    "input = 1\noutput = 1\ncahced = 0.1", "input = 1\noutput = 1\ncached = [1]", "input = 1e308\noutput = 1"
])
def test_a_price_that_is_none_is_refused(price, tmp_path):
    from evaluation.prices import read_price
    (tmp_path / "p.toml").write_text(f"[m]\n{price}\n")
    with pytest.raises(Misuse, match="numbers of at least 0"):
        read_price(str(tmp_path / "p.toml"), "m")


def test_a_file_of_the_wrong_shape_is_refused(tmp_path):
    from evaluation.prices import read_price
    (tmp_path / "p.toml").write_text("m = 1\n")
    with pytest.raises(Misuse, match="needs input and output"):
        read_price(str(tmp_path / "p.toml"), "m")
    (tmp_path / "p.json").write_text('{"m": {"input": 1, "output": 2, "cached": 0.5}}')
    assert read_price(str(tmp_path / "p.json"), "m") == {"input": 1.0, "output": 2.0, "cached": 0.5}
