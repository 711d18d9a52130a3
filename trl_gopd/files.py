"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Context for writing a file: under another name first, which takes the place of `path` if nothing was raised.

    Args:
        path (`pathlib.Path`): Where the file goes. What stands there stays until the new one is whole.

    Yields:
        `pathlib.Path`: Where to write meanwhile: in the same folder, with the same suffix.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_gopd.files import written_whole
    >>> with written_whole(Path("state.json")) as part:  # doctest: +SKIP
    ...     part.write_text("{}")

    ```
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
