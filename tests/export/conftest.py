"""One import of llama.cpp's conversion scripts for all tests of GGUF files."""

from collections.abc import Iterator

import pytest

from qlora_train.export.gguf.converter import Converter
from tests.support.imported_converter import imported_converter


@pytest.fixture(scope="session")
def converter() -> Iterator[Converter]:
    with imported_converter() as converter:
        yield converter
