"""`optc search`: methods and bits tried on one model, each compiled under the gate and measured; what is best of them.

What was found so far stands in `search.json` of the output folder, written after each try, so that a search that was
stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from optc.compiler.diagnostics import (
    JSON_ERRORS,
    GateError,
    InputError,
    NoMatchError,
    OptcError,
    TargetError,
    UsageError,
    os_errors,
)
from optc.compiler.files import read_plain, replace_file
from optc.compiler.model_folder.checkpoint import check_folder, weights_digest
from optc.hub import local_model
from optc.planning import make_plan
from optc.request import Request
from optc.targets.methods import METHODS, STATIC

PLAIN = "none"
"""The name of the try without quantization: what the others' speed is compared with."""
SLACK = 1.02
"""A try whose predicted size is beyond the limit by more than the prediction may be off is not compiled."""
PROMPT, NEW_TOKENS = 128, 32
_STATE = "search.json"
_MOST_STATE = 1 << 20  # bytes; a try takes some hundred
_Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9+-]{1,64}\Z")]
"""Of a try and its folder, which leads nowhere else: folders of tries are removed."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a try must keep to; None is no limit.

    Attributes:
        max_loss: relative rise of the perplexity over the source's.
        max_size: MB of weights.
    """

    max_loss: float | None = None
    max_size: float | None = None


class Tried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One try.

    Attributes:
        name: of its folder: the method and the bits.
        outcome: "made"; "too large" by the plan, and not compiled; "gate": it lost more than the gate allows;
            "refused": the target or the model does not take it.
        why: of an outcome that is not "made".
        size: bytes of the weights, as planned where it was not made.
        perplexity, loss, kl: on the text; the loss is the relative rise over the source's.
        decode: tokens/s; speed: the same over that of the try without quantization, of pairs. None where no engine of
            this machine runs the artifact.
        seconds: of the compile.
    """

    name: _Name
    outcome: Literal["made", "too large", "gate", "refused"]
    why: str = ""
    size: int = 0
    perplexity: float | None = None
    loss: float | None = None
    kl: float | None = None
    decode: float | None = None
    speed: float | None = None
    seconds: float = 0.0

    def keeps(self, limits: Limits) -> bool:
        """Whether it was made and is within the limits."""
        if self.outcome != "made" or self.loss is None:
            return False
        large = limits.max_size is not None and self.size > limits.max_size * 1e6
        return not large and (limits.max_loss is None or self.loss <= limits.max_loss)


class _State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is on the disk: of which search, and its tries by name."""

    key: str
    tried: dict[_Name, Tried]


def names_of(request: Request, methods: Sequence[str], bits: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """(name, keys of a request) of each try: the plain compile, then each method with each of the bits that it takes.

    Args:
        methods: () for all that the target has, but those for convolutions and those that choose bits themselves.
        bits: of methods that have no bits of their own.

    Raises:
        UsageError: a method that the target does not take.
    """
    support = request.target.quant
    chosen = methods or [name for name in support if name != STATIC and not METHODS[name].own_bits]
    found: list[tuple[str, dict[str, Any]]] = [(PLAIN, {})]
    for method in chosen:
        if method not in support:
            raise UsageError(
                f"target '{request.target.name}' does not take the method '{method}'",
                remedy=f"choose among: {', '.join(support)}",
            )
        known = METHODS[method]
        if known.fixed:
            found.append((method, {"quant": method}))
        elif known.own_bits:
            found += [(f"{method}-{count}", {"quant": method, "average_bits": float(count)}) for count in bits]
        else:
            able = [count for count in bits if count in support[method].bits]
            found += [(f"{method}-{count}", {"quant": method, "bits": count}) for count in able]
    return found


def front(tried: Iterable[Tried], limits: Limits) -> list[Tried]:
    """The tries within the limits that no other beats: none is at once no larger, no worse and no slower, and better in
    one of it. Smallest first."""
    fit = [item for item in tried if item.keeps(limits)]
    return sorted((item for item in fit if not any(_beats(other, item) for other in fit)), key=lambda item: item.size)


def _beats(one: Tried, other: Tried) -> bool:
    left, right = ((item.size, item.loss or 0.0, -(item.speed or 0.0)) for item in (one, other))
    return left != right and all(a <= b for a, b in zip(left, right, strict=True))


def search(
    model: str | Path,
    request: Request,
    output: Path,
    text: Path,
    *,
    methods: Sequence[str] = (),
    bits: Sequence[int] = (4, 8),
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    windows: int | None = None,
    samples: int = 5,
    keep_all: bool = False,
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> dict[str, Any]:
    """Try the methods and bits on a decoder; artifacts of the front stay in `output` under their names.

    Args:
        request: what all tries have in common: the target and its options, calibration, limits of the gate; without a
            method, and without an output.
        samples: timed generations of each try, in turn with the plain one; 0 measures no speed.
        keep_all: leave the artifacts of the other tries too.

    Returns:
        A JSON-able dict: `tried`, every try; `front`, names of the best, smallest first; `limits`.

    Raises:
        UsageError: a method that the target lacks. TargetError: a model that makes no text. InputError: the folder is of
            another search. ResourceError: memory or the disk ran out; a rerun goes on.
    """
    folder = Path(local_model(model))
    tries = names_of(request, methods, bits)
    plan = make_plan(folder, request)
    if not plan["kv_cache_bytes_per_token"]:
        raise TargetError(
            "optc search scores the text of decoders, and this model makes none",
            where=str(model),
            remedy="compile it with each method, and use optc compare --inputs",
        )
    work = _Search(folder, request, output, text, limits, windows, samples)
    for number, (name, keys) in enumerate(tries):
        progress(number, name)
        work.attempt(name, keys)
    tried = [work.state.tried[name] for name, _ in tries]
    best = front(tried, limits)
    for item in best:
        work.restore(item.name, dict(tries)[item.name])
    if not keep_all:
        work.remove_all_but({item.name for item in best} | {PLAIN})
    return {
        "model": str(model),
        "target": request.target.name,
        "limits": msgspec.structs.asdict(limits),
        "tried": [msgspec.structs.asdict(item) for item in tried],
        "front": [item.name for item in best],
    }


class _Search:
    """A search on its folder."""

    def __init__(
        self, model: Path, request: Request, output: Path, text: Path, limits: Limits, windows: int | None, samples: int
    ) -> None:
        self.model, self.request, self.output, self.limits = model, request, output, limits
        self.text = read_plain(text, "reading the text").decode("utf-8-sig", "replace")
        self.windows, self.samples = windows, samples
        self.state = self._opened()

    def _key(self) -> str:
        """What the figures depend on beside method and bits."""
        parts = [
            weights_digest(check_folder(self.model, trust_remote_code=self.request.what.trust_remote_code)),
            self.request.target.name,
            repr(msgspec.structs.replace(self.request, target=None)),
            f"{self.windows} {self.samples}",
            self.text,
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _opened(self) -> _State:
        path, key = self.output / _STATE, self._key()
        if not path.exists():
            if self.output.exists() and any(self.output.iterdir()):
                raise InputError("the folder is not of a search", where=str(self.output), remedy="give an empty one")
            return _State(key=key, tried={})
        try:
            found = msgspec.json.decode(read_plain(path, "reading the search", most=_MOST_STATE), type=_State)
        except JSON_ERRORS as error:
            raise InputError(
                "the search cannot be read", where=str(path), why=str(error), remedy="remove the folder"
            ) from error
        if found.key != key:
            raise InputError(
                "the folder is of another search",
                where=str(self.output),
                why="the model, the text or what all tries have in common differs",
                remedy="give another folder, or remove this one",
            )
        return found

    def attempt(self, name: str, keys: Mapping[str, Any]) -> None:
        """Make and measure one try, or take what is known of it."""
        known = self.state.tried.get(name)
        if known is not None and (known.outcome != "too large" or self._too_large(known.size)):
            return
        found = self._made(name, keys)
        self.state.tried[name] = found
        with os_errors("writing the search", str(self.output)):
            self.output.mkdir(parents=True, exist_ok=True)
            replace_file(self.output / _STATE, msgspec.json.format(msgspec.json.encode(self.state)))

    def _too_large(self, size: int) -> bool:
        return self.limits.max_size is not None and size > SLACK * self.limits.max_size * 1e6

    def _made(self, name: str, keys: Mapping[str, Any]) -> Tried:
        from optc.api import compile

        request = self._request(name, keys)
        try:
            planned = int(make_plan(self.model, request)["weight_bytes"])
            if name != PLAIN and self._too_large(planned):
                return Tried(name=name, outcome="too large", why=f"{planned} bytes are planned", size=planned)
            made = compile(self.model, request=request)
        except GateError as error:
            return Tried(name=name, outcome="gate", why=_line(error), size=planned)
        except (TargetError, InputError, NoMatchError, UsageError) as error:
            if name == PLAIN:
                raise
            return Tried(name=name, outcome="refused", why=_line(error))
        perplexity, loss, kl = self._quality(made.artifact)
        decode, speed = self._speed(made.artifact)
        return Tried(
            name=name,
            outcome="made",
            size=made.manifest.weight_bytes,
            decode=decode,
            speed=speed,
            seconds=made.manifest.seconds["total"],
            perplexity=perplexity,
            loss=loss,
            kl=kl,
        )

    def restore(self, name: str, keys: Mapping[str, Any]) -> None:
        """Compile again what an earlier search measured and removed."""
        from optc.api import compile

        if not (self.output / name).exists():
            compile(self.model, request=self._request(name, keys))

    def _request(self, name: str, keys: Mapping[str, Any]) -> Request:
        """What all tries have in common, with a method; a fixed one has groups of its own."""
        asked = self.request.quantization
        method = keys.get("quant")
        if method is None:
            asked = type(asked)()
        elif METHODS[method].fixed:
            asked = msgspec.structs.replace(asked, group_size=None, quant=method)
        else:
            asked = msgspec.structs.replace(asked, **keys)
        run = msgspec.structs.replace(self.request.run, output=self.output / name, force=True)
        return msgspec.structs.replace(self.request, quantization=asked, run=run)

    def _quality(self, artifact: Path) -> tuple[float, float, float]:
        """Perplexity on the text, its relative rise over the source's, and the KL."""
        from optc.runtime.measuring.evaluate import evaluate
        from optc.runtime.measuring.reference import open_reference
        from optc.runtime.sessions.load import load

        with closing(load(artifact, eager=True)) as model:
            found = evaluate(
                model.session, model.encode(self.text), open_reference(model.manifest, self.model), windows=self.windows
            )
        assert found.reference_perplexity is not None
        assert found.kl is not None
        return found.perplexity, found.perplexity / found.reference_perplexity - 1, found.kl

    def _speed(self, artifact: Path) -> tuple[float | None, float | None]:
        """Decoding of a try, in tokens/s and over the plain one's, in turn with it."""
        from optc.compiler.artifact.engines import find_engine
        from optc.compiler.artifact.folder import read_manifest
        from optc.runtime.measuring.paired_speed import generating, speeds_in_turn
        from optc.runtime.sessions.load import load

        if not self.samples or find_engine(read_manifest(artifact).engine, "").eager:
            return None, None
        plain = self.output / PLAIN
        self.restore(PLAIN, {})
        with closing(load(plain)) as first, closing(load(artifact)) as second:
            length = max(1, min(PROMPT, first.session.context_length - NEW_TOKENS))
            runs = [generating(model.session, length, NEW_TOKENS) for model in (first, second)]
            paired = speeds_in_turn(runs, self.samples)[1]
        name = "decode_tokens_per_s"
        return paired.rates[name].median, paired.ratios[name].median

    def remove_all_but(self, names: set[str]) -> None:
        """Remove the artifacts of other tries; their figures stay."""
        for name in self.state.tried.keys() - names:
            with os_errors("removing an artifact", str(self.output / name)):
                if (self.output / name).exists():
                    shutil.rmtree(self.output / name)


def _line(error: OptcError) -> str:
    return " ".join(str(error).split())
