"""`optc sign`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import emit, json_option, say
from optc.cli.options import struct_flags


class SignOptions(msgspec.Struct, frozen=True, kw_only=True):
    """With which key."""

    key: Annotated[Path, Meta(description="Private key of Ed25519, in PEM.")]
    new_key: Annotated[bool, Meta(description="Make the key first, and its public half beside it as KEY.pub.")] = False


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@struct_flags(SignOptions)
@json_option
def sign(artifact: Path, options: SignOptions, as_json: bool) -> None:
    """Sign ARTIFACT, so that others can tell who made it: manifest.sig holds the signature of its manifest.

    Who has put the public key into ~/.config/optc/trusted-keys can load its native code without --trust.

    \b
    optc sign out/fiction-inductor --key maker.pem --new-key
    optc verify out/fiction-inductor --key maker.pem.pub
    """
    from optc.compiler.artifact.folder import sign_artifact
    from optc.compiler.artifact.trust import SIGNATURE, new_keys

    public = new_keys(options.key) if options.new_key else None
    sign_artifact(artifact, options.key)
    result = {
        "artifact": str(artifact),
        "signature": str(artifact / SIGNATURE),
        "public_key": None if public is None else str(public),
    }
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    say(f"{result['signature']}: signed")
    if result["public_key"]:
        say(f"{result['public_key']}: give this to whoever shall trust the artifact")
