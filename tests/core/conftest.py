import pytest

from gymlink.align import ChatFormat, load_format


@pytest.fixture(scope="session")
def chat_format(tokenizer) -> ChatFormat:
    return load_format(tokenizer)
