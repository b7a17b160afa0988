"""JSON of others."""
import pytest

from evaluation import surrogates


def test_what_is_nested_too_deeply_is_no_json():
    with pytest.raises(ValueError, match="nested"):
        surrogates.loads(b"[" * 200_000)
