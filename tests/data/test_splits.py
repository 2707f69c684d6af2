"""The held-out rule: by text alone, nested over fractions, of the expected size."""

import numpy as np

from llamapro.data.splits import document_hash, is_heldout

HASHES = np.array([document_hash(f"document {i}".encode()) for i in range(20_000)], dtype=np.uint64)


def test_the_share_is_as_asked():
    for fraction in (0.01, 0.2):
        assert abs(is_heldout(HASHES, fraction).mean() - fraction) < 4 * np.sqrt(fraction / HASHES.size)
    assert not is_heldout(HASHES, 0.0).any() and is_heldout(HASHES, 1.0).all()


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    assert (is_heldout(HASHES, 0.05) <= is_heldout(HASHES, 0.1)).all()


def test_the_rule_is_the_documented_one():
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    expected = [mix(int(h) ^ 0x6C6C616D6170726F) >> 11 < 0.1 * 2**53 for h in HASHES[:2000]]
    assert is_heldout(HASHES[:2000], 0.1).tolist() == expected
