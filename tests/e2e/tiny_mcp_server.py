"""An MCP server of a few lines, without the SDK: it starts at once. For how sessions begin and end, and what they leave.

Run as: tiny_mcp_server.py FOLDER. Files in FOLDER change what a new session finds: "broken" ends it at once, "fewer" leaves out
a tool, "deaf" answers nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
TOOLS = ["count", "pid", "environment", "hang", "die", "garbage", "no_result"]
calls = 0


def call(name: str) -> str:
    global calls
    match name:
        case "count":
            calls += 1
            return str(calls)
        case "pid":
            return str(os.getpid())
        case "environment":
            return "\n".join(sorted(os.environ))
        case "hang":
            time.sleep(3600)
        case "die":
            print("Segmentation fault (as asked)", file=sys.stderr, flush=True)
            os._exit(3)
        case "garbage":
            os.write(1, b"this is no message\n")
            return "and still an answer"
    return "here"


def answer(method: str, params: dict) -> object:
    match method:
        case "initialize":
            version = params["protocolVersion"]
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "tiny", "version": "1"}}
        case "tools/list":
            names = TOOLS if (folder / "fewer").exists() else [*TOOLS, "sometimes"]
            return {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in names]}
        case "tools/call" if params["name"] == "no_result":
            return {"text": "of no known form"}
        case "tools/call":
            return {"content": [{"type": "text", "text": call(params["name"])}]}
    return {}


if (folder / "broken").exists():
    sys.exit("no such database (as asked)")
for line in sys.stdin:
    message = json.loads(line)
    if "id" in message and not (folder / "deaf").exists():
        result = answer(message["method"], message.get("params", {}))
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
