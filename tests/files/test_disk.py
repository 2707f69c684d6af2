"""The disk check compares with what is really free, and looks at the nearest folder that exists."""

import shutil
from pathlib import Path

import pytest

from llamapro.errors import UserError
from llamapro.files.disk import require_free_space


def test_more_than_is_free_is_refused_and_less_is_not(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_free_space(tmp_path / "not" / "yet", free // 2, "the test")
    with pytest.raises(UserError, match="the test needs"):
        require_free_space(tmp_path / "not" / "yet", free * 2, "the test")
