"""Which documents are held out: decided by the hash of a document's text alone.

The salt is fixed, so a text that is held out in one dataset is held out in every dataset built with the same or a
larger fraction, whatever its other contents.
"""

import numpy as np
import xxhash
from numpy.typing import NDArray

from llamapro.data.arrays import BoolArray
from llamapro.data.permutation import mix

HELDOUT_SALT = 0x6C6C616D6170726F
_KEPT_BITS = 53


def document_hash(text: bytes) -> int:
    """The 64-bit hash of a document's UTF-8 text (XXH3-64)."""
    return xxhash.xxh3_64_intdigest(text)


def is_heldout(hashes: NDArray[np.uint64], fraction: float) -> BoolArray:
    """(documents,) whether documents with these hashes belong to the held-out split of this expected share."""
    places = mix(hashes ^ np.uint64(HELDOUT_SALT)) >> np.uint64(64 - _KEPT_BITS)
    return places.astype(np.float64) < fraction * float(1 << _KEPT_BITS)
