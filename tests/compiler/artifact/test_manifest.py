"""The manifest: what it says survives the disk, and one changed byte is noticed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from artifacts import make_manifest

from optc.compiler.artifact.manifest import decode, encode, is_made_here, marked
from optc.compiler.diagnostics import ArtifactError


def sealed(edit: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest that a forger changed and sealed again."""
    data = json.loads(encode(make_manifest()))
    edit(data)
    data["self_sha256"] = ""
    text = json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"
    digest = hashlib.sha256(text).hexdigest().encode()
    return text.replace(b'"self_sha256": ""', b'"self_sha256": "' + digest + b'"')


def test_round_trip_keeps_every_field() -> None:
    manifest = make_manifest(quality={"perplexity": 22.935}, speed=None)
    read = decode(encode(manifest), "manifest.json")
    assert msgspec.structs.replace(read, self_sha256="") == manifest
    assert encode(read) == encode(manifest)


def test_seal_is_the_hash_of_the_file_with_the_seal_empty() -> None:
    data = encode(make_manifest())
    digest = json.loads(data)["self_sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"")).hexdigest() == digest


def test_a_forged_manifest_with_a_right_seal_is_read() -> None:
    """The forger of the tests below makes valid files, so that they fail for the reason they name."""
    assert decode(sealed(lambda data: data.update(target="other")), "m").target == "other"


def test_every_changed_byte_is_noticed() -> None:
    data = encode(make_manifest())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(ArtifactError):
            decode(bytes(changed), "manifest.json")


@pytest.mark.parametrize("keep", [0, 1, 20, 200, -2, -1])
def test_truncated(keep: int) -> None:
    with pytest.raises(ArtifactError, match="the manifest is damaged"):
        decode(encode(make_manifest())[:keep], "manifest.json")


def test_white_space_is_sealed_too() -> None:
    with pytest.raises(ArtifactError, match="cause: it was changed after it was written") as caught:
        decode(encode(make_manifest()).replace(b": 24", b":  24"), "m")
    assert caught.value.where == "m"
    with pytest.raises(ArtifactError) as caught:
        decode(encode(make_manifest()) + b"\n", "m")
    assert caught.value.where == "m"
    assert caught.value.why == "it does not end with self_sha256: cut off, or not written by optc"


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"\xff{}", b'{"format_version": "1"}', b"[" * 100_000])
def test_not_a_manifest(text: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        decode(text, "out/x/manifest.json")
    assert caught.value.exit_code == 7
    assert caught.value.where == "out/x/manifest.json"
    assert caught.value.why
    assert caught.value.remedy == "copy the artifact again from where it was made, or compile it again"


def _nested(levels: int) -> Any:
    return {"a": _nested(levels - 1)} if levels else 1


def test_other_version_names_both() -> None:
    with pytest.raises(ArtifactError) as caught:
        decode(sealed(lambda data: data.update(format_version=1, new_field=1)), "m")
    assert caught.value.what == "the manifest has format version 1, this optc reads 3"
    assert caught.value.where == "m"
    assert caught.value.remedy == "use the optc that wrote the artifact, or compile it again"


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda d: d.update(engine=5), r"Expected `str`, got `int` - at `\$.engine`"),
        (lambda d: d.update(weight_bytes="10"), r"Expected `int`, got `str` - at `\$.weight_bytes`"),
        (lambda d: d.update(weight_bytes=-1), r"Expected `int` >= 0 - at `\$.weight_bytes`"),
        (lambda d: d["source"].update(surprise=1), "Object contains unknown field `surprise`"),
        (lambda d: d.pop("target"), "Object missing required field `target`"),
        (lambda d: d["files"][0].update(sha256="A" * 64), r"at `\$.files\[0\].sha256`"),
        (lambda d: d["passes"][0].update(layer_drift=[None]), r"Expected `float`, got `null`"),
        (lambda d: d["programs"]["model"]["contract"].update(kind="other"), "Invalid enum value 'other'"),
        (lambda d: d["programs"]["model"]["contract"]["model"].update(context_length=-1), "Expected `int` >= 0"),
        (lambda d: d["programs"]["model"]["contract"]["model"].update(vocab_size=1 << 63), "Expected `int` <= 4611686"),
        (lambda d: d["programs"]["model"].update(engine_info={"x": _nested(65)}), "nested more than 64 levels"),
    ],
)
def test_wrong_types(edit: Callable[[dict[str, Any]], None], cause: str) -> None:
    with pytest.raises(ArtifactError, match=cause) as caught:
        decode(sealed(edit), "m")
    assert caught.value.what == "the manifest is damaged"


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/a", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb", "manifest.json"],
)
def test_paths_that_leave_the_folder(path: str) -> None:
    with pytest.raises(ArtifactError, match="is not a plain path inside the artifact") as caught:
        decode(sealed(lambda data: data["files"][0].update(path=path)), "m")
    assert caught.value.where == "m"


def test_a_file_listed_twice() -> None:
    with pytest.raises(ArtifactError, match=r"'ir/00-capture\.txt' is listed twice") as caught:
        decode(sealed(lambda data: data["files"].append(data["files"][0])), "m")
    assert caught.value.where == "m"


def test_an_unknown_engine_is_said_of_the_file() -> None:
    with pytest.raises(ArtifactError) as caught:
        decode(sealed(lambda data: data.update(engine="steam")), "m")
    assert caught.value.where == "m"


def test_equal_manifests_give_equal_bytes_that_people_can_read() -> None:
    """Whatever the order in which tables were filled."""
    one, two = (
        encode(make_manifest(seconds=dict(items))) for items in ((("a", 1.0), ("b", 2.0)), (("b", 2.0), ("a", 1.0)))
    )
    assert one == two
    assert one.startswith(b'{\n  "format_version": 3,\n')


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_drift_that_json_cannot_hold_is_a_bug(value: float) -> None:
    record = msgspec.structs.replace(make_manifest().passes[0], layer_drift=(value,))
    with pytest.raises(AssertionError, match=r"^a pass recorded a layer drift that is not finite"):
        encode(make_manifest(passes=(record,)))


def test_programs_by_role() -> None:
    """An artifact may hold a draft beside the model; what is said of "the" contract is the model's."""
    model = make_manifest().programs["model"]
    draft = msgspec.structs.replace(model, engine_info={"model": "draft/model.onnx"})
    manifest = make_manifest(programs={"model": model, "draft": draft})
    read = decode(encode(manifest), "m")
    assert read.programs["draft"].engine_info == {"model": "draft/model.onnx"}
    assert (read.contract, read.engine_info) == (model.contract, model.engine_info)
    edited = read.with_program("draft", engine_info={})
    assert (edited.programs["draft"].engine_info, edited.engine_info) == ({}, model.engine_info)
    assert read.with_program(engine_info={}).engine_info == {}
    for programs, cause in (
        ({}, "its programs lack the role 'model'"),
        ({"tail": {}}, "Invalid enum value 'tail'"),
    ):
        with pytest.raises(ArtifactError, match=f"cause: {cause}") as caught:
            decode(sealed(lambda data, programs=programs: data.update(programs=programs)), "m")
        assert caught.value.where == "m"


def test_what_drafts_is_a_decoder() -> None:
    def drafts(data: dict[str, Any], **changes: Any) -> None:
        model = data["programs"]["model"]
        data["programs"]["draft"] = {**model, "contract": {**model["contract"], **changes}}

    assert "draft" in decode(sealed(drafts), "m").programs
    with pytest.raises(ArtifactError, match="no decoder of its own"):
        decode(sealed(lambda data: drafts(data, kind="module")), "m")


def test_the_mark_of_this_machine_is_of_all_but_itself_and_the_seal() -> None:
    manifest = marked(make_manifest())
    assert manifest == msgspec.structs.replace(make_manifest(), made_here=manifest.made_here)
    assert is_made_here(manifest)
    assert is_made_here(decode(encode(manifest), "m"))
    assert is_made_here(marked(decode(encode(manifest), "m"))), "an artifact that is marked again"
    changed = {"target": "trt", "weight_bytes": 11, "made_here": "0" * 64, "passes": ()}
    for name, value in changed.items():
        assert not is_made_here(msgspec.structs.replace(manifest, **{name: value})), name
    assert not is_made_here(make_manifest())
