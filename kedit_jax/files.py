"""Files that outlive a crash: flushed to the disk, found out when they change, written by one process at a time."""

import contextlib
import errno
import hashlib
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

SUMS = "SHA256SUMS"
"""The sums of all other files of a folder, as `sha256sum -c SHA256SUMS` reads them."""

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def sync(path: Path) -> None:
    """Have the disk hold it: a rename can outlive a power failure that the data do not.

    Not every file system can open a folder or sync it (network ones answer EINVAL), and what was written is good all the
    same; a file that cannot be synced is an error.
    """
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files that a folder holds now."""
    lines = [f"{_sum(folder / name)}  {name}\n" for name in _names(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, only: str | None = None) -> list[str]:
    """What is wrong with a folder's files, or with `only` one of them, by its `SHA256SUMS`: changed, cut, missing, unlisted.

    A damaged `SHA256SUMS` shows, too, as files that do not match it. Nothing is raised.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} cannot be read: {error}"]
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    present = _names(folder)
    problems = irregular(folder)
    if problems:
        return problems
    for name in sorted({*listed, *present}) if only is None else [only]:
        if name not in listed:
            problems.append(f"{name} is not in {SUMS}")
        elif name not in present:
            problems.append(f"{name} is missing")
        else:
            try:
                if _sum(folder / name) != listed[name]:
                    problems.append(f"{name} does not have the checksum that it was written with")
            except OSError as error:
                problems.append(f"{name} cannot be read: {error}")
    return problems


def irregular(folder: Path) -> list[str]:
    """What in a folder is neither a file nor a folder: a link may lead anywhere, a device may have no end."""
    odd = [path for path in folder.rglob("*") if not (path.is_dir() or path.is_file()) or path.is_symlink()]
    return [f"{path.relative_to(folder).as_posix()} is a link or no regular file" for path in sorted(odd)]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one that writes in a folder, which is made if it is missing.

    The lock is the kernel's, on a file that is held open: whatever ends the process, it ends the lock. The file stays, and
    says nothing while nobody writes.

    Raises:
        BlockingIOError: another process writes there; the message names it.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A folder may come from anyone: a lock that is a link would have another file emptied, a pipe would wait for ever.
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # there are none on Windows
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | careful, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_nlink > 1:
            raise OSError(errno.EINVAL, "the lock is no file of its own; delete it", str(folder / LOCK))
        try:
            _lock(handle)
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0).decode(errors="replace") or "another process"
            raise BlockingIOError(holder) from None
        with contextlib.suppress(OSError):  # a full disk: then nobody learns who it is
            now = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()} since {now}".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        import fcntl  # there is none on Windows
    except ImportError:
        warnings.warn("this system has no file locks: make sure that one process at a time writes the folder", stacklevel=4)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"no file lock ({error}): make sure that one process at a time writes the folder", stacklevel=4)


def _names(folder: Path) -> list[str]:
    """All files but the sums, as paths from the folder; what systems hide there (.nfs..., .DS_Store) does not count."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in found if path.name != SUMS and not path.name.startswith("."))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
