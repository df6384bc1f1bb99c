"""Whose native code is run: that of artifacts made on this machine, signed with a trusted key, or trusted by the user.

Hashes find damage, not who wrote an artifact. So a machine marks what it makes: HMAC-SHA256 (RFC 2104) of the manifest
under a key that never leaves it (`machine.key`, readable by its user alone). And a manifest can be signed: Ed25519 (RFC
8032) by the library `cryptography`, over the bytes of manifest.json, which holds the hash of every other file.

Places follow the XDG base directories: $XDG_STATE_HOME/optc/machine.key (~/.local/state), and public keys that are trusted
in $XDG_CONFIG_HOME/optc/trusted-keys/*.pem (~/.config).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError, InputError, TargetError, foreign_errors, os_errors
from optc.compiler.files import new_file, read_plain, sync_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.sig"
_MOST_KEY, _KEY_BYTES = 1 << 16, 32
_FORMAT = 1


class _Signature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """manifest.sig: public key and signature in hex."""

    format: int
    key: str
    signature: str


# -- made on this machine --------------------------------------------------------------------------


def machine_mark(data: bytes) -> str:
    """The mark of this machine under some bytes; "" where it can keep no key."""
    key = _machine_key(make=True)
    return hmac.new(key, data, hashlib.sha256).hexdigest() if key else ""


def is_machine_mark(mark: str, data: bytes) -> bool:
    """Whether this machine made the mark of these bytes."""
    key = _machine_key(make=False)
    return bool(key and mark) and hmac.compare_digest(hmac.new(key, data, hashlib.sha256).hexdigest(), mark)


def _machine_key(*, make: bool) -> bytes:
    """The machine's key, b"" where there is none. One that others may read is no secret, and not used."""
    path = _home("XDG_STATE_HOME", ".local/state") / "machine.key"
    with contextlib.suppress(OSError, InputError):
        if make and not path.exists():
            _write_key(path)
        if path.stat().st_mode & 0o077 == 0:
            key = read_plain(path, "reading the machine's key", most=_MOST_KEY, follow=False)
            return key if len(key) == _KEY_BYTES else b""
    return b""


def _write_key(path: Path) -> None:
    """Make a key; of two processes at once the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        new_file(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
    sync_folder(path.parent)


def _home(variable: str, default: str) -> Path:
    given = os.environ.get(variable, "")
    return (Path(given) if given.startswith("/") else Path.home() / default) / "optc"


# -- signatures ------------------------------------------------------------------------------------


def new_keys(private: Path) -> Path:
    """Make a pair of keys: the private one at `private`, for its owner alone, the public one beside it as `.pub`.

    A private key without the other half, as a killed run leaves it, gets it.

    Returns:
        the path of the public key.

    Raises:
        InputError: the public key exists, or one of them cannot be written; then neither is left.
        TargetError: cryptography is not installed.
    """
    serialization, ed25519 = _cryptography()
    public = private.with_name(private.name + ".pub")
    made = not private.exists()
    key: Ed25519PrivateKey = ed25519.Ed25519PrivateKey.generate() if made else _private_key(private)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    lines = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with contextlib.ExitStack() as undo, os_errors("writing a key", str(private if made else public)):
        if made:
            new_file(private, pem, mode=0o600)
            undo.callback(private.unlink)
        new_file(public, lines, mode=0o644)
        undo.callback(public.unlink)
        sync_folder(private.parent)
        undo.pop_all()
    return public


def _private_key(path: Path) -> Ed25519PrivateKey:
    serialization, _ = _cryptography()
    pem = read_plain(path, "reading the private key", most=_MOST_KEY)
    with foreign_errors("the private key cannot be read", where=str(path), remedy=_KEYS):
        key: Ed25519PrivateKey = serialization.load_pem_private_key(pem, password=None)
        _raw(key.public_key())
        return key


def sign(data: bytes, private: Path) -> bytes:
    """The content of manifest.sig for the bytes of a manifest.

    Raises:
        InputError: the key cannot be read, or is not one of Ed25519.
        TargetError: cryptography is not installed.
    """
    key = _private_key(private)
    with foreign_errors("the private key cannot be read", where=str(private), remedy=_KEYS):
        made = _Signature(format=_FORMAT, key=_raw(key.public_key()).hex(), signature=_signed(key, data).hex())
    return msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"


def check_signature(folder: Path, data: bytes, keys: dict[str, bytes]) -> str:
    """Hold the signature of an artifact to trusted keys.

    Args:
        data: the bytes of its manifest.json. keys: name -> raw public key.

    Returns:
        the name of the key.

    Raises:
        ArtifactError: no signature, one of another key, or one that is not of these bytes.
        TargetError: cryptography is not installed.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        raise _refused(folder, f"it has no {SIGNATURE}", "ask its maker for a signature (optc sign)")
    try:
        found = msgspec.json.decode(
            read_plain(path, "reading the signature", most=_MOST_KEY, follow=False), type=_Signature
        )
        key, signature = bytes.fromhex(found.key), bytes.fromhex(found.signature)
    except JSON_ERRORS as error:
        raise _refused(path, str(error), "copy the artifact again from where it was made") from error
    name = next((name for name, raw in keys.items() if hmac.compare_digest(raw, key)), None)
    if name is None or found.format != _FORMAT:
        raise _refused(path, f"it is signed with the key {found.key[:16]}..., which is not trusted here", _TRUST_KEY)
    _, ed25519 = _cryptography()
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        again = "copy the artifact again; do not use this one"
        raise _refused(path, "the signature is not of this manifest", again) from error
    return name


def read_public_key(path: Path) -> bytes:
    """The raw bytes of a public key in PEM.

    Raises:
        InputError: it cannot be read, or is not one of Ed25519.
        TargetError: cryptography is not installed.
    """
    serialization, _ = _cryptography()
    pem = read_plain(path, "reading the public key", most=_MOST_KEY)
    with foreign_errors("the public key cannot be read", where=str(path), remedy=_KEYS):
        return _raw(serialization.load_pem_public_key(pem))


def trusted_keys() -> dict[str, bytes]:
    """The public keys that this user trusts: file name -> raw key.

    Raises:
        InputError: one of them cannot be read.
    """
    folder = _home("XDG_CONFIG_HOME", ".config") / "trusted-keys"
    return {path.name: read_public_key(path) for path in sorted(folder.glob("*.pem"))} if folder.is_dir() else {}


_KEYS = "give a key of Ed25519 in PEM: optc sign --new-key makes a pair, openssl genpkey -algorithm ed25519 too"
_TRUST_KEY = "put the maker's public key into ~/.config/optc/trusted-keys/NAME.pem, if you trust it"


def _raw(key: Ed25519PublicKey) -> bytes:
    raw = key.public_bytes_raw() if hasattr(key, "public_bytes_raw") else b""  # RSA has none
    if len(raw) != _KEY_BYTES:
        raise ValueError("it is a key of another algorithm")
    return raw


def _signed(key: Ed25519PrivateKey, data: bytes) -> bytes:
    return key.sign(data)


def _refused(where: Path, why: str, remedy: str) -> ArtifactError:
    return ArtifactError("the artifact is not signed by a trusted key", where=str(where), why=why, remedy=remedy)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise TargetError(
            "signatures need the library cryptography", why=str(error), remedy="pip install 'optc[signing]'"
        ) from error
    return serialization, ed25519
