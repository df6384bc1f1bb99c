"""The page at `/`: one file, and a policy that lets it run its own script and nothing of others."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

_PAGE = Path(__file__).with_name("page.html")


def page_response() -> Response:
    """The page; its policy allows its own script and style and nothing of others."""
    text, allowed = _page()
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(text, headers=headers, media_type="text/html")


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    text = _PAGE.read_text(encoding="utf-8")
    return text, {tag: _hashes(tag, text) for tag in ("script", "style")}


def _hashes(tag: str, text: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(item.encode()).digest()).decode()}'" for item in bodies)
