"""An MCP server of a few lines, without the SDK: it starts at once. For how sessions begin and end, and what they leave.

Run as: tiny_mcp_server.py FOLDER. Files in FOLDER change what a new session finds: "broken" ends it at once, "fewer" leaves out
a tool (whose call is then an error, "coded" one of the protocol), "town" gives that tool another argument, "deaf" answers
nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
TOOLS = ["count", "pid", "environment", "hang", "die", "garbage", "noise", "no_result", "daemon"]
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
        case "daemon":
            code = "import subprocess as s; print(s.Popen(['sleep', '3600'], stdout=s.DEVNULL, start_new_session=True).pid)"
            made = subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
            return made.stdout.strip()
        case "die":
            print("Segmentation fault (as asked)", file=sys.stderr, flush=True)
            os._exit(3)
        case "garbage":
            os.write(1, b"this is no message\n")
            return "and still an answer"
        case "noise":
            for number in range(2000):
                os.write(1, b"{progress: %d}\n" % number)
            return "after all that"
    return "here"


def schema(name: str) -> dict:
    argument = "town" if name == "sometimes" and (folder / "town").exists() else "street"
    return {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument] if name == "sometimes" else [],
    }


def refusal(arguments: dict) -> str:
    if (folder / "fewer").exists():
        return "Unknown tool: sometimes"
    if (folder / "town").exists() and "town" not in arguments:
        return "town is required"
    return "no such street" if arguments.get("street") == "none" else ""


def answer(method: str, params: dict) -> object:
    match method:
        case "initialize":
            version = params["protocolVersion"]
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "tiny", "version": "1"}}
        case "tools/list":
            names = TOOLS if (folder / "fewer").exists() else [*TOOLS, "sometimes"]
            return {"tools": [{"name": name, "inputSchema": schema(name)} for name in names]}
        case "tools/call" if params["name"] == "sometimes" and (gone := refusal(params.get("arguments") or {})):
            coded = {"code": -32602, "message": gone}
            return coded if (folder / "coded").exists() else {"content": [{"type": "text", "text": gone}], "isError": True}
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
        key = "error" if isinstance(result, dict) and "code" in result else "result"
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], key: result}), flush=True)
