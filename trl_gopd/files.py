"""Atomic writing of files: readers see the complete old file or the complete new one, never a part of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Context manager that writes a file under a temporary name and renames it to `path` when the body ends without an
    exception. After an exception the temporary file is removed and `path` is left as it was.

    Args:
        path (`pathlib.Path`): Final path of the file. A file that exists there is kept until the new one is complete.

    Yields:
        `pathlib.Path`: Temporary path to write to. It is in the same folder and has the same suffix as `path`.

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
