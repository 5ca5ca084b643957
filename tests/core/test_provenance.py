"""What a page says of where its numbers come from."""

import pytest

from medalign_jax.core import provenance


@pytest.mark.parametrize(
    ("commit", "parts", "batch", "words"),
    [
        ("0123456789abcdef" * 2 + "01234567", 1, "48", "0123456789ab"),
        ("0123456789abcdef" * 2 + "01234567-dirty", 2, "48, in 2 parts", "0123456789ab, with "
         "changes"),
        (None, 1, "48", "unknown"),
    ],
)  # fmt: skip
def test_a_page_says_what_a_reader_needs(commit, parts, batch, words):
    found = provenance.provenance() | {"git_commit": commit}
    told = dict(provenance.provenance_rows(found, 48, parts))
    assert told["batch"] == batch and told["git commit"] == words
    assert told["devices"] == found["devices"] and "numpy 2" in told["versions"]
