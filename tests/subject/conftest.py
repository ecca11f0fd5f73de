from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.subject.user_files import Write, folder_of_the_user


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    with folder_of_the_user(tmp_path.resolve()) as write:
        yield write
