"""Artifacts on disk: describe, verify, rewrite. Nothing in one is parsed before every hash was checked."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import msgspec

from optc.compiler.artifact import genai_config
from optc.compiler.artifact.early_hashes import EarlyHashes
from optc.compiler.artifact.engines import find_engine
from optc.compiler.artifact.manifest import FILE_NAME, FileEntry, Manifest, decode, encode, is_made_here, marked
from optc.compiler.artifact.publishing import check_output, leftovers, write_folder
from optc.compiler.artifact.trust import SIGNATURE, check_signature, sign, trusted_keys
from optc.compiler.diagnostics import ArtifactError, InputError, os_errors
from optc.compiler.files import replace_file, sha256_of, side_by_side

__all__ = [
    "check_output",
    "check_trusted",
    "finish",
    "read_manifest",
    "rewrite",
    "sign_artifact",
    "verify",
    "write_folder",
]

_MAX_MANIFEST = 32 << 20
_REMEDY = "copy the artifact again from where it was made, or compile it again"


def finish(
    directory: Path, manifest: Manifest, *, made_here: bool = True, early: EarlyHashes | None = None
) -> Manifest:
    """Hash every file as it is on disk, write manifest.json, read it back.

    Args:
        early: hashes that were taken before.
        made_here: this machine made all of it, and marks it as its own.

    Returns the manifest as a reader will see it, with `files` and `self_sha256` filled.

    Raises:
        ArtifactError: the folder holds a link or something else that is not a file.
        ResourceError, InputError: the disk is full or not writable.
    """
    with os_errors("writing the manifest", str(directory)):
        for name in (FILE_NAME, SIGNATURE):
            (directory / name).unlink(missing_ok=True)
        found = {path: info.st_size for path, info in _regular_files(directory).items()}
        files = tuple(
            FileEntry(path=path, size=size, sha256=sha256)
            for (path, size), sha256 in zip(found.items(), _hashes(directory, found, early), strict=True)
        )
        native = find_engine(manifest.engine, str(directory)).native_code_of(manifest.engine_infos)
        manifest = msgspec.structs.replace(manifest, files=files, native_code=native, made_here="")
        (directory / FILE_NAME).write_bytes(encode(marked(manifest) if made_here else manifest))
    return read_manifest(directory)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; its own seal is checked, the other files are not (see `verify`).

    Raises:
        InputError: there is no such folder (3).
        ArtifactError: no manifest, or a damaged one (7).
    """
    if not folder.is_dir():
        what = "the artifact is not a folder" if folder.exists() else "the artifact does not exist"
        raise InputError(what, where=str(folder), remedy="give the folder that `optc compile -o` wrote")
    path = folder / FILE_NAME
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(
            f"the folder has no {FILE_NAME}",
            where=str(folder),
            remedy="give the folder that `optc compile -o` wrote, or compile again",
        )
    with _reading(folder):
        size = path.stat().st_size
        if size > _MAX_MANIFEST:
            raise ArtifactError("the manifest is damaged", where=str(path), why=f"{size} bytes", remedy=_REMEDY)
        return decode(path.read_bytes(), str(path))


def verify(folder: Path) -> Manifest:
    """Check every file of an artifact against its manifest, before any engine sees one.

    Each listed file must be there, a plain file without other names, of the listed size and sha256;
    no other file may be there. What onnxruntime-genai would read must be what optc writes.

    Raises:
        InputError: there is no such folder (3).
        ArtifactError: names the file and what is wrong with it (7).
    """
    manifest = read_manifest(folder)
    with _reading(folder):
        found = _regular_files(folder)
        _check_links(folder, FILE_NAME, found.pop(FILE_NAME))
        found.pop(SIGNATURE, None)  # of the manifest; what is in it is checked where it is asked for
        listed = {entry.path: entry for entry in manifest.files}
        for path in sorted(listed.keys() - found.keys()):
            raise _tampered(folder, path, "is missing")
        for path in sorted(found.keys() - listed.keys()):
            raise _tampered(folder, path, "is not in the manifest", remedy="remove the file, or compile again")
        for path, entry in listed.items():
            if found[path].st_size != entry.size:
                raise _tampered(folder, path, "has the wrong size", f"{found[path].st_size} bytes, not {entry.size}")
            _check_links(folder, path, found[path])
        hashes = _hashes(folder, {path: entry.size for path, entry in listed.items()})
        for (path, entry), sha256 in zip(listed.items(), hashes, strict=True):
            if sha256 != entry.sha256:
                raise _tampered(folder, path, "was changed", f"sha256 {sha256}, not {entry.sha256}")
        if genai_config.FILE_NAME in listed:
            genai_config.check_genai_config(folder, manifest.engine_info.get("model"))
    return manifest


def check_trusted(folder: Path, manifest: Manifest, trust: bool, *, isolated: bool = True) -> None:
    """Refuse what could harm this process, of an artifact that nobody vouches for.

    Args:
        manifest: verified. trust: the user does.
        isolated: an engine that dies of the artifact takes nothing else down: only native code is refused.

    Raises:
        ArtifactError: it was not made here, bears no signature of a trusted key, and `trust` is not given.
    """
    engine = find_engine(manifest.engine, str(folder))
    native = engine.native_code_of(manifest.engine_infos)
    if ((isolated or engine.eager) and not native) or trust or is_made_here(manifest):
        return
    try:
        check_signature(folder, (folder / FILE_NAME).read_bytes(), trusted_keys())
    except ArtifactError as error:
        what = "holds native code, and was not" if native else "was not"
        risk = "loading it would run the code" if native else f"a fault of {engine.name} would end this process"
        own = "" if native else "optc run opens it in a process of its own; "
        raise ArtifactError(
            f"the artifact {what} made on this machine",
            where=str(folder / native[0]) if native else str(folder),
            why=f"{risk}; {error.why}",
            remedy=f"{own}if you trust whoever made it, add --trust (in Python trust=True), or trust a key (docs/deploy.md)",
        ) from error


def sign_artifact(folder: Path, private: Path) -> Manifest:
    """Verify an artifact and put the signature of its manifest beside it; one that is there is replaced.

    Raises:
        ArtifactError: it is damaged. InputError: the key cannot be read, or the signature not be written.
        TargetError: cryptography is not installed.
    """
    manifest = verify(folder)
    data = sign((folder / FILE_NAME).read_bytes(), private)
    with os_errors("writing the signature", str(folder)):
        # Written beside the artifact: a killed run may leave no file in it that the manifest does not name.
        replace_file(folder / SIGNATURE, data, place=folder.resolve().parent)
    return manifest


def rewrite(
    folder: Path,
    edit: Callable[[Path, Manifest], Manifest],
    *,
    replaces: Collection[str] = ("report.html",),
) -> Manifest:
    """Publish an artifact again with another manifest, in one step and without copying weights.

    Args:
        edit: gets a folder with every file of the artifact but those of `replaces`, and the manifest;
            writes files into it and returns the new manifest. The files it finds are shared with the
            published artifact until the swap: it must not write into them.
        replaces: paths that `edit` writes anew.

    Raises:
        ArtifactError: the artifact is damaged; a rewrite must not give damage a valid hash.
        InputError, ResourceError: the place is not writable, or full.
    """
    folder = folder.resolve()
    manifest = verify(folder)
    with write_folder(folder, force=True) as directory:
        for entry in manifest.files:
            if entry.path not in replaces:
                _link(folder / entry.path, directory / entry.path)
        result = finish(directory, edit(directory, manifest), made_here=is_made_here(manifest))
        before = {entry.path: entry.sha256 for entry in manifest.files}
        for entry in result.files:
            changed = entry.sha256 != before.get(entry.path, entry.sha256)
            shared = changed and (directory / entry.path).samefile(folder / entry.path)
            assert not shared, f"an edit wrote into '{entry.path}', which the published artifact shares"
    return result


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError as error:  # filesystems without hard links, files of another owner
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS):
            raise
        shutil.copyfile(source, place)


def _hashes(folder: Path, sizes: Mapping[str, int], early: EarlyHashes | None = None) -> list[str]:
    """sha256 of each file of a folder, by name and size in bytes."""

    def read(path: str) -> str:
        found = early.of(path) if early is not None else None
        return sha256_of(folder / path) if found is None else found

    return side_by_side(read, list(sizes), sum(sizes.values()))


def _regular_files(folder: Path) -> dict[str, os.stat_result]:
    """Every file below a folder by POSIX path, sorted; links, pipes and devices are refused unopened."""
    found, pending = {}, [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            path = Path(entry.path).relative_to(folder).as_posix()
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                found[path] = entry.stat(follow_symlinks=False)
            else:
                why = "a symbolic link" if entry.is_symlink() else "a pipe, socket or device"
                raise _tampered(folder, path, "is not a plain file", why)
    return dict(sorted(found.items()))


def _check_links(folder: Path, path: str, info: os.stat_result) -> None:
    """Refuse a file that has another name: it could be changed there after it was checked.

    Names below the temporary folders of a `rewrite`, live or killed, are our own.
    """
    if info.st_nlink == 1:
        return
    place = folder.resolve()
    others = [sibling / path for sibling in leftovers(place)]
    known = sum(other.is_file() and os.path.samestat(other.lstat(), info) for other in others)
    if info.st_nlink > 1 + known:
        why = f"{info.st_nlink - 1 - known} more hard links point to it"
        raise _tampered(folder, path, "has other names", why, remedy="copy the artifact without hard links")


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            "the artifact cannot be read",
            where=str(error.filename or folder),
            why=str(error),
            remedy="check its permissions and the disk",
        ) from error


def _tampered(folder: Path, path: str, what: str, why: str | None = None, *, remedy: str = _REMEDY) -> ArtifactError:
    name = path if path.isprintable() else path.encode("unicode_escape").decode()
    return ArtifactError(f"'{name}' {what}", where=str(folder), why=why, remedy=remedy)
