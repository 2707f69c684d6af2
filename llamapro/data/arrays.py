"""Names for the NumPy array types used in this package."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
AnyArray = NDArray[Any]
EMPTY: IntArray = np.zeros(0, dtype=np.int64)
EMPTY.flags.writeable = False
