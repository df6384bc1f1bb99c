"""Starts a server as `optc serve` does, with an engine of the tests: `python serving_driver.py CONFIG`; JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import msgspec

from optc.cli.common import guarded
from optc.runtime.serving.settings import ServerConfig
from optc.runtime.serving.supervisor import Supervisor


def main() -> None:
    config = msgspec.json.decode(sys.argv[1], type=ServerConfig, dec_hook=lambda _, value: Path(value))

    def tell(event: str, more: dict[str, object]) -> None:
        print(json.dumps({"event": event, **more}), flush=True)

    async def serve() -> None:
        await Supervisor(config, tell).run()

    sys.exit(guarded(lambda: asyncio.run(serve()), as_json=True))


if __name__ == "__main__":
    main()
