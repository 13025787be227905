"""Tools of the agent."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metis_fast.config.section import (
    BY_CONTENT,
    MAY_CHANGE,
    FilePath,
    JsonObject,
    Named,
    NonNegative,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
    Several,
    Text,
)
from metis_fast.config.tool_server import ToolServeConfig, ToolServerConfig
from metis_fast.types import ToolName

CallSyntax = Literal["strict", "lenient"]
WarmLibrary = Literal["matplotlib", "scipy", "sympy", "pandas", "skimage", "cv2"]


class PythonToolConfig(Section):
    """The `python` tool: one sandboxed session a rollout."""

    timeout_s: PositiveFloat = 20.0
    """Wall seconds a call may take."""
    memory_mb: Positive = 1024
    """Address-space limit of each process of a session, beyond what the warm interpreter holds."""
    session_memory_mb: Positive = 2048
    """Limit of all processes of a session and of its scratch folder together; beyond it the session is stopped."""
    scratch_mb: Positive = 64
    """Size of the session's private scratch folder."""
    max_output_chars: Positive = 20000
    """Longer output is cut in the middle."""
    images: Literal["original", "seen"] = "original"
    """`image_1`, `image_2`, ...: the prompt's images as they are in the data, or at the size in which the model sees them, so
    that coordinates agree. Both upright and in RGB."""
    max_image_pixels: Positive = 5_242_880
    """Larger images that code shows are scaled down to this (the recipe: 5,120 tokens of 32 x 32 pixels)."""
    max_shown_mb: Positive = 64
    """Images that one call may show, together and as PNG; all calls of a rollout may show four times as much."""
    warm: Several[WarmLibrary] = ()
    """Libraries that the server imports once, so that every session has them at once. They must be installed."""
    pool: Annotated[NonNegative, MAY_CHANGE] = 4
    """Sessions kept ready, so that a rollout's first call does not wait for one to start."""
    unsafe: bool = False
    """Run model-written code without a sandbox. Only for machines that you can throw away."""


class HttpSearchConfig(Section):
    """Any search endpoint that answers with JSON, for `provider: http`. In values and in `tools.text_search.url` these names in
    braces stand for something: {query}, {count} (`max_results`), {key}, {hl} and {gl} (language and country of the query)."""

    method: Literal["GET", "POST"] = "GET"
    """POST sends `body`."""
    params: Annotated[dict[str, Text], Named] = Field(default={})
    """Parameters behind the address, for example {q: "{query}", num: "{count}"}."""
    headers: Annotated[dict[str, Text], Named] = Field(default={})
    """More headers, for example {Authorization: "Bearer {key}"}."""
    body: JsonObject = Field(default={})
    """JSON of a POST, for example {q: "{query}", num: "{count}"}; "{count}" by itself becomes a number."""
    results: Text = "results"
    """Where the list of results stands in the reply: names and positions with dots between, like `data.items`; empty: the reply
    is the list."""
    title: Text = "title"
    """Where a result has its title."""
    link: Text = "link"
    """Where a result has its address."""
    snippet: Text = "snippet"
    """Where a result has its text."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        places = {name: getattr(self, name) for name in ("title", "link", "snippet")}
        for name, place in places.items():
            for other, outer in places.items():
                if place != outer and (not outer or place.startswith(f"{outer}.")):
                    raise ValueError(
                        f"tools.text_search.http.{name}={place!r} lies inside of {other}={outer!r}, which has to be a text; "
                        "set each to where a text stands"
                    )
        for name, text in self.headers.items():
            if not f"{name}{text}".isascii() or not f"{name}{text}".isprintable():  # neither is shown: it may hold a key
                raise ValueError(
                    "tools.text_search.http.headers: expected printable ASCII, got other signs in one; remove them, or write "
                    "them percent-encoded"
                )
        return self


_KEYS = {"serper": "SERPER_API_KEY", "brightdata": "BRIGHTDATA_API_TOKEN", "serpapi": "SERPAPI_API_KEY"}


class TextSearchConfig(Section):
    """The `text_search` tool, over a local corpus or a provider on the web (docs/web-search.md)."""

    provider: Literal["local", "serper", "brightdata", "serpapi", "http"] = "local"
    """Who answers: `local` is the corpus."""
    corpus: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Parquet file, or folder of them, with columns `title`, `link`, `text`; indexed when a run starts."""
    max_results: Positive = 3
    """Results in an observation."""
    snippet_chars: Positive = 300
    """Length of a snippet of the corpus."""
    api_key_env: Annotated[Text, MAY_CHANGE] = ""
    """Environment variable that holds the provider's key. Empty: SERPER_API_KEY, BRIGHTDATA_API_TOKEN, SERPAPI_API_KEY; none
    for `http`."""
    zone_env: Annotated[Text, MAY_CHANGE] = "BRIGHTDATA_ZONE"
    """Environment variable that holds the zone of Bright Data."""
    url: Annotated[Text, MAY_CHANGE] = ""
    """Where requests go. Empty: the provider's own address; `http` has none."""
    requests_per_s: Annotated[PositiveFloat, MAY_CHANGE] = 10.0
    """Most requests a second, of each process that searches."""
    concurrency: Annotated[Positive, MAY_CHANGE] = 16
    """Most requests in flight, of each process that searches."""
    connect_s: Annotated[PositiveFloat, MAY_CHANGE] = 10.0
    """Seconds for a connection."""
    timeout_s: Annotated[PositiveFloat, MAY_CHANGE] = 20.0
    """Seconds for one request, its connection included."""
    retries: Annotated[NonNegative, MAY_CHANGE] = 4
    """Tries after the first, with exponential back-off or as long as Retry-After says; then the rollout is repeated."""
    deadline_s: Annotated[PositiveFloat, MAY_CHANGE] = 300.0
    """Seconds for one search: all its tries, and the wait for its turn."""
    cache: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """SQLite file of past results, on a local disk; processes and runs may share it. None: each process remembers its own."""
    reference_cache: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Cache of the reference (JSON lines of `query`, `result`, `timestamp`), which is asked behind `cache`; only read."""
    offline: bool = False
    """Answer from the caches alone. A query that they do not have is a failure of ours, never `No results`."""
    http: HttpSearchConfig = HttpSearchConfig()

    @property
    def key_name(self) -> str:
        """Environment variable that holds the provider's key; empty where there is none."""
        return "" if self.provider == "local" else self.api_key_env or _KEYS.get(self.provider, "")

    def variables(self) -> tuple[str, ...]:
        """Those that a process needs which searches, and no other: the key's and, for Bright Data, the zone's."""
        zone = self.zone_env if self.provider == "brightdata" else ""
        return tuple(name for name in (self.key_name, zone) if name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (("api_key_env", self.api_key_env), ("zone_env", self.zone_env)):
            if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):  # a key that was put here is not shown
                raise ValueError(
                    f"tools.text_search.{name}: expected the name of an environment variable, in capitals, like "
                    "SERPER_API_KEY, got something else; a key itself does not belong into a config"
                )
        if self.provider == "http" and not self.api_key_env and "{key}" in f"{self.url} {self.http}":
            raise ValueError(
                "tools.text_search.http asks for {key}, and no variable holds one; set tools.text_search.api_key_env"
            )
        if self.provider == "http" and not self.url:
            raise ValueError("tools.text_search.provider=http needs an address; set tools.text_search.url")
        if self.provider == "local":
            for name in ("url", "cache", "reference_cache", "offline"):
                if getattr(self, name):
                    raise ValueError(
                        f"tools.text_search.{name} is for a provider on the web, got provider=local; set "
                        f"tools.text_search.provider, or remove {name}"
                    )
        elif self.offline and self.cache is None and self.reference_cache is None:
            raise ValueError("tools.text_search.offline=true has nothing to answer from; set tools.text_search.cache")
        return self


class ImageSearchConfig(Section):
    """The `image_search` tool: over a local set of images, by looks; or in a published cache, by the row's index."""

    corpus: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Parquet file, or folder of them, with columns `title`, `link`, `image` (bytes or paths); indexed when a run
    starts."""
    max_results: Positive = 2
    """Results of the corpus in an observation, each with a thumbnail."""
    thumbnail_px: Positive = 256
    """Longest side of a thumbnail."""
    cache: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """JSON file, {index: {tool_returned_web_title: [...], cached_images_path: [...]}}, looked up by `extra_info.index` of the
    row. With `corpus` as well, that is asked where the cache has nothing."""
    cache_images: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """Folder that the paths of `cache` start from; none: the one in which it lies."""


class McpServerConfig(Section):
    """An MCP server whose tools the agent has: one session a rollout, from its first call to its end (docs/own-tools.md)."""

    command: Several[Text] = ()
    """Program and arguments that start the server, which talks over its standard streams; each session is a process. This or
    `url`."""
    env: Annotated[dict[str, Text], Named, MAY_CHANGE] = Field(default={})
    """Variables for `command`, beside HOME, LOGNAME, PATH, SHELL, TERM and USER: {NAME: text}; `$OTHER` as the text stands for
    what our variable OTHER holds."""
    url: Annotated[Text, MAY_CHANGE] = ""
    """Address of a server that runs already (streamable HTTP). This or `command`."""
    token_env: Annotated[Text, MAY_CHANGE] = ""
    """Environment variable with the token that goes to `url` as `Authorization: Bearer`; empty: none goes."""
    tools: Several[Text] = ()
    """Only these of its tools; none: all."""
    prefix: Text = ""
    """Put in front of the names of its tools, where two servers have the same."""
    failures: Several[Text] = ()
    """Regular expressions for texts with which the server reports failures of its own as errors of a call (`isError`): they are
    ours then, and not the agent's, for example "connection refused"."""
    connect_s: Annotated[PositiveFloat, MAY_CHANGE] = 30.0
    """Seconds to start a session."""
    queue_s: Annotated[PositiveFloat, MAY_CHANGE] = 300.0
    """Seconds that a session waits for its turn to start; two a CPU core start at the same time."""
    timeout_s: Annotated[PositiveFloat, MAY_CHANGE] = 60.0
    """Seconds for one call; one that takes longer is a failure of ours, and the rollout is repeated."""

    def variables(self) -> tuple[str, ...]:
        """Variables of our environment whose values its sessions get."""
        named = [text[1:] for text in self.env.values() if text.startswith("$")]
        return tuple(dict.fromkeys([self.token_env] * bool(self.token_env) + named))


class ToolsConfig(Section):
    """Which tools the agent has."""

    enabled: Several[ToolName] = (ToolName.PYTHON, ToolName.TEXT_SEARCH, ToolName.IMAGE_SEARCH)
    """The built-in tools that the agent has. Calling one that it does not have is its error."""
    own: Several[Text] = ()
    """Tools of your own, each as `module:Class`, installed or in the working folder (docs/own-tools.md)."""
    own_timeout_s: Annotated[PositiveFloat, MAY_CHANGE] = 60.0
    """Seconds for one call of a tool of your own; one that takes longer is a failure of ours, and the rollout is repeated."""
    mcp: Several[McpServerConfig] = ()
    """MCP servers whose tools the agent has, too."""
    max_output_chars: Positive = 20000
    """Longer text of a tool of your own or of an MCP server is cut in the middle."""
    describe: bool = True
    """Tell the model in the system message of tools of `own` and `mcp` that the row does not name; built-in ones are named by
    the rows alone."""
    offer: Literal["all", "row"] = "all"
    """Which tools answer in a row: `all`; or only those that `extra_info.tools` lists or, where a row has no such list, those
    that its system message offers, if it offers any."""
    call_syntax: CallSyntax = "strict"
    """`strict`: a call is JSON. `lenient`: also what can only mean one thing, such as raw line breaks or single quotes."""
    record: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """File, on a local disk, that keeps every answer of tools and judges, for `replay`; new, or one that is there
    (docs/record.md)."""
    replay: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """File of `record` that answers in place of tools and judges: no network, keys, sandbox or corpora are needed. What it does
    not have ends the run."""
    python: PythonToolConfig = PythonToolConfig()
    text_search: TextSearchConfig = TextSearchConfig()
    image_search: ImageSearchConfig = ImageSearchConfig()
    server: Annotated[ToolServerConfig, MAY_CHANGE] = ToolServerConfig()
    serve: Annotated[ToolServeConfig, MAY_CHANGE] = ToolServeConfig()

    @model_validator(mode="after")
    def _check_recording(self) -> Self:
        if self.record is not None and self.replay is not None:
            raise ValueError(
                f"expected tools.record or tools.replay, got both ({self.record}, {self.replay}); a run that records uses "
                "what its file has: remove one"
            )
        return self

    @model_validator(mode="after")
    def _check_others(self) -> Self:
        for name in self.own:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name):
                raise ValueError(f"tools.own: expected tools as module:Class, like my_tools:WordCount, got {name!r}")
        for number, server in enumerate(self.mcp):
            _check_mcp(f"tools.mcp.{number}", server)
        return self


def _check_mcp(key: str, server: McpServerConfig) -> None:
    """Here and not in the section, whose errors show what they refuse: a key may stand there."""
    if bool(server.command) == bool(server.url):
        raise ValueError(f"{key}: expected either command or url; name the one by which the server is reached")
    if server.command and " " in server.command[0]:
        raise ValueError(f"{key}.command: expected a program and its arguments as a list, like [uvx, mcp-server-time]")
    if server.url and not re.match(r"https?://", server.url):
        raise ValueError(f"{key}.url: expected an address that begins with http:// or https://")
    for name, value in (("env", server.env), ("token_env", server.token_env)):
        if value and bool(server.url) == (name == "env"):
            raise ValueError(f"{key}.{name} is for {'a command' if name == 'env' else 'a url'}; remove it")
    if not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in (*server.env, *server.variables())):
        raise ValueError(
            f"{key}: expected names of environment variables in env, behind $ and in token_env, got something else; a key "
            "itself does not belong into a config"
        )
    for pattern in server.failures:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}.failures: expected regular expressions, got {pattern!r} ({error})") from None
    if not re.fullmatch(r"[\w.-]*", server.prefix, re.ASCII):
        raise ValueError(f"{key}.prefix: expected letters, digits, _, - and . only, got {server.prefix!r}")
