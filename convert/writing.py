"""Results that are on disk whole or not at all, whenever the process is killed or the disk is full.

What is being written stands in a work folder that one process holds at a time, on the disk of its target: inside it
if it exists, for it may be a mount point, or lie under a folder that cannot be written to; else beside it, to be
renamed when it is complete. Files are on the disk before they get their names.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where two processes at one target are not told of each other
    fcntl = None  # type: ignore[assignment]

from .files.folder import CONFIG, INDEX, WEIGHTS

LOCK = "lock"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # weights of an earlier checkpoint
ASIDE = re.compile(r"(saved-[0-9a-f]{8})-.+")  # see publish
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of some network file systems


def write_whole(file: Path, data: bytes) -> None:
    """All of it or nothing, whenever the process is killed."""
    scratch = file.with_name(f"{file.name}.part")
    scratch.write_bytes(data)
    sync([scratch])
    os.replace(scratch, file)
    sync([file.parent])


def sync(paths: Iterable[Path]) -> None:
    """Wait until files, and the names in folders, have reached the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():  # no folder can be opened there
            continue
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a folder on a file system that cannot
                raise
        finally:
            os.close(handle)


@contextmanager
def work_folder(target: Path, kind: str, *, wait: bool) -> Iterator[Path]:
    """A folder in which `target` is prepared, made if it is missing, and held until the end, also a sudden one.

    kind: the end of its name, "saving" say
    wait: for another process that holds it; else OSError says which that is
    """
    while (held := _hold(target, kind, wait)) is None:
        pass
    try:
        yield held[0]
    finally:
        os.close(held[1])


def clear(folder: Path, *keep: str) -> None:
    """Empty a work folder but for the lock and the names in `keep`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, *keep):
            path.unlink()


def dissolve(folder: Path, note: str = "") -> None:
    """Remove a work folder: first what the file `note` in it speaks of; the lock last, for who waits for it goes on."""
    clear(folder, note)
    clear(folder)
    with suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()


def where(target: Path, kind: str) -> Path:
    """The work folder of a target."""
    return target / f".{kind}" if target.is_dir() else target.with_name(f".{target.name}-{kind}")


def _hold(target: Path, kind: str, wait: bool) -> tuple[Path, int] | None:
    """A target's work folder and the handle that locks it; None if that was not its place any more."""
    folder = where(target, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # its holder removed it just now
        return None
    except OSError:
        with suppress(OSError):
            folder.rmdir()
        raise
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            raise OSError(f"{target} is being written by {holder}; wait for it, or choose another target") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:  # there, no lock is better than no result
                raise
        if os.path.samestat(os.stat(folder / LOCK), os.fstat(handle)):
            if where(target, kind) == folder:
                with suppress(OSError):  # a full disk
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return folder, handle
            with suppress(OSError):  # the target came into being, and with it another work folder
                (folder / LOCK).unlink()
                folder.rmdir()
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new folder for the files of a checkpoint, which become those of `directory` if nothing fails.

    Raises OSError if they cannot be written; a checkpoint that was there is whole then, too.
    """
    target = directory.resolve()  # through a link, to the disk where it will be
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with work_folder(target, "saving", wait=True) as folder:
            new = folder / "checkpoint"
            try:
                shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
                new.mkdir()
                yield new
                publish(new, target)
            finally:
                with suppress(OSError):
                    dissolve(folder)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"save: cannot write {directory}: {error}; a checkpoint that was there is whole") from error
        raise


def publish(new: Path, target: Path) -> None:
    """Give a finished checkpoint, the files in the folder `new`, its name, on the same disk, in one step.

    Where there is a checkpoint already, the step is the replacement of config.json: the new one first names weights
    that stand aside ("transformers_weights", which transformers and our load follow), so that nothing but it decides
    which of the two is there. Then the weights get their usual names, and a second replacement ends the detour.
    Files that belong to neither stay. Killed in between, the folder holds the old or the new checkpoint, whole; what is
    left over goes with the next one.
    """
    main = next((name for name in (INDEX, WEIGHTS) if (new / name).exists()), "")
    if main and (new / CONFIG).exists() and target.exists():
        if (target / CONFIG).exists():
            _switch(new, target, main)
        for path in target.iterdir():
            if OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink()
    settle(new, target)
    _sweep(target)


def settle(new: Path, target: Path) -> None:
    """Move the files in the folder `new` to their place, config.json last, without which nothing there is loaded."""
    files = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    sync([*(new / name for name in files), new])
    if not target.exists():
        os.rename(new, target)
        sync([target.parent])
        return
    for name in sorted(files, key=lambda name: (name == CONFIG, name == INDEX)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name == CONFIG:
            sync([target])
        os.replace(new / name, target / name)
    sync([target])


def _switch(new: Path, target: Path, main: str) -> None:
    """Make `target` the new checkpoint, its weights under names that nothing has there."""
    _sweep(target)
    aside, scratch = f"saved-{secrets.token_hex(4)}", new / "scratch"
    try:
        weights = {WEIGHTS}
        if main == INDEX:
            index = json.loads((new / INDEX).read_text())
            weights = set(index["weight_map"].values())
            index["weight_map"] = {key: f"{aside}-{name}" for key, name in index["weight_map"].items()}
            (target / f"{aside}-{INDEX}").write_text(json.dumps(index))
            sync([target / f"{aside}-{INDEX}"])
        sync(new / name for name in weights)
        for name in weights:
            try:
                os.link(new / name, target / f"{aside}-{name}")
            except OSError:  # a file system without links
                shutil.copyfile(new / name, target / f"{aside}-{name}")
                sync([target / f"{aside}-{name}"])
        config = json.loads((new / CONFIG).read_text()) | {"transformers_weights": f"{aside}-{main}"}
        scratch.write_text(json.dumps(config))
        sync([scratch, target])
        os.replace(scratch, target / CONFIG)
    except BaseException:
        _sweep(target)
        raise
    sync([target])


def _sweep(target: Path) -> None:
    """Remove weights that stand aside, but for those that the config names."""
    try:
        named = str(json.loads((target / CONFIG).read_bytes())["transformers_weights"])
    except (OSError, ValueError, KeyError, TypeError):
        named = ""
    for path in target.iterdir():
        if (aside := ASIDE.fullmatch(path.name)) and not named.startswith(aside[1]):
            path.unlink()
