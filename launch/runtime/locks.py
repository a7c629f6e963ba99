"""Acquire a file lock where the disk may have none."""

from errno import ENOLCK

from filelock import FileLock


def acquire(lock: FileLock, timeout: float = -1) -> None:
    """Acquire a lock, within `timeout` seconds (-1: however long it takes).

    Raises:
        Timeout: if somebody else holds it.
        OSError: if it cannot be made, ENOLCK where the disk has no locks: filelock has an exception
            of its own for some such disks.
    """
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError as error:
        raise OSError(ENOLCK, "its disk has no file locks") from error
