"""The live page at /rheoserve, in the process that serves HTTP.

The page's files hold nothing of the server, so that a browser can open them; what they show comes from
/rheoserve/data, which asks for the server's API key as any other endpoint does.
"""

import sys
import time
from pathlib import Path

from rheoserve_sgl.observe import question
from rheoserve_sgl.server_args import selects_rheoserve

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
FOLDER = Path(__file__).with_name("page")
FILES = {
    "/rheoserve": ("index.html", "text/html"),
    "/rheoserve/page.js": ("page.js", "text/javascript"),
    "/rheoserve/page.css": ("page.css", "text/css"),
}
MOST_INDEX = 1 << 16  # of a layer or head that may be asked for
LONGEST_RID = 256


def add_routes(server_args=None):
    """BEFORE `set_uvicorn_logging_configs`: SGLang is about to listen, and its application exists."""
    module = sys.modules.get(HTTP_SERVER)
    if module is None or server_args is None or not selects_rheoserve(server_args):
        return
    from fastapi import HTTPException

    for path, (name, kind) in FILES.items():
        module.app.add_api_route(path, sender(FOLDER / name, kind), methods=["GET"], include_in_schema=False)

    async def data(rid: str = "", layer: int = 0, head: int = 0):
        for name, value in (("layer", layer), ("head", head)):
            if not 0 <= value < MOST_INDEX:
                raise HTTPException(400, f"{name} is {value}; legal: 0 to {MOST_INDEX - 1}")
        if len(rid) > LONGEST_RID:
            raise HTTPException(400, f"rid has {len(rid)} characters; legal: up to {LONGEST_RID}")
        return {"time": time.time(), "ranks": await look(module, rid, layer, head)}

    module.app.add_api_route("/rheoserve/data", data, methods=["GET"])


def sender(file: Path, kind: str):
    """An endpoint that gives a file."""
    from fastapi.responses import FileResponse

    async def send():
        return FileResponse(file, media_type=kind)

    return send


async def look(module, rid: str, layer: int, head: int) -> list[dict]:
    """RheoServe's part of the internal state of each data-parallel rank, with what the page asks for."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = module.get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=question.write(rid, layer, head)))
    return [one.internal_state["rheoserve"] for one in answers]


def allow_page(original, **kwargs):
    """AROUND `decide_request_auth`: the page's own files need no key."""
    if kwargs.get("method") == "GET" and kwargs.get("path") in FILES:
        from sglang.srt.utils.auth import AuthDecision

        return AuthDecision(allowed=True)
    return original(**kwargs)
