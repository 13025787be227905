"""The agent's tools. `open_toolbox` is the door; `protocol` says what comes out of it.

Nothing heavy is imported here: the warm Python server of the sandbox imports this package too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from metis_fast.config import ToolsConfig
    from metis_fast.tools.protocol import Toolbox, ToolSpec


def open_toolbox(config: ToolsConfig, scratch: Path) -> Toolbox:
    """Check and open the enabled tools, building indexes that are not there yet; start the warm Python server if `python` is
    one of them.

    scratch: existing or new folder for what the tools keep while they are open; nothing is left in it after `close()`.

    Raises:
        ToolSetupError: no sandbox on this machine; a corpus that is not set, missing, or without the needed columns; a tool of
            one's own that cannot be imported, or an MCP server that does not answer.
    """
    from metis_fast.tools.toolbox import LocalToolbox  # at first use, see above

    return LocalToolbox.open(config, scratch)


def other_tools(config: ToolsConfig) -> tuple[ToolSpec, ...]:
    """What tools of one's own and of MCP servers say of themselves; they are opened for it, and closed again. Where the tools
    are a tool server's, it is asked.

    Raises:
        ToolSetupError: one of them cannot be opened, or the server has other tools than the run.
    """
    if not config.own and not config.mcp:
        return ()
    from pathlib import Path

    if config.server.url:
        from metis_fast.tools.server.client import ServerToolbox

        toolbox: Toolbox = ServerToolbox(config)
    else:
        toolbox = open_toolbox(config.model_copy(update={"enabled": ()}), Path())
    try:
        return tuple(tool for tool in toolbox.tools if tool.name not in config.enabled)
    finally:
        toolbox.close()
