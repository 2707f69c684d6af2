"""The identity of a model's tokenizer, to be compared with that of its datasets."""

from pathlib import Path

from llamapro.data.tokenizer_identity import tokenizer_identity
from llamapro.errors import ModelRefused

TOKENIZER_FILE = "tokenizer.json"


def model_tokenizer_identity(folder: Path) -> str:
    """The identity of the tokenizer in a model folder, the same that `llamapro data build` writes into datasets.

    Raises:
        ModelRefused: there is no tokenizer.json, or it can't be read.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ModelRefused(f"{folder} has no {TOKENIZER_FILE}, so its datasets can't be checked; copy it from the base")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelRefused(f"{path} can't be read: {error}") from error
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    return tokenizer_identity(added, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))
