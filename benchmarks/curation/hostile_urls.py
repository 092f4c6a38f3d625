"""Hostile tables of URLs and hostile sites: a builder for each kind writes a table, and a server on the loopback answers.

Registered with the kinds of hostile_inputs.py. A URL is read if it is downloaded or left out by a rule of the ledger.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hostile_inputs import KINDS, MIB, kind, picture, sparse

from tasks.curation.config import SourceConfig, UrlConfig

PIECE = bytes(2**16)
# Shorter waits than a recipe's defaults; the limits of bytes, redirects, requests at a time and rows are the defaults.
URLS = UrlConfig(allow_http=True, timeout_s=3.0, max_retries=1)
NO_ROBOTS = URLS.model_copy(update={"obey_robots": False})
ROBOTS = URLS.model_copy(update={"timeout_s": 30.0})
PATIENT = NO_ROBOTS.model_copy(update={"timeout_s": 120.0, "max_retries": 0})
_ROWS = 256
SITES: dict[str, UrlConfig] = {}  # name of a kind -> how its URLs are downloaded


def site(ends: str, config: UrlConfig = NO_ROBOTS) -> Callable:
    """Registers a builder of a table of URLs: (folder, function from a path and a host to a URL)."""

    def register(build: Callable[[Path, Callable[..., str]], None]) -> Callable:
        name = build.__name__
        SITES[name] = config
        kind(ends)(build)
        return build

    return register


def _table(folder: Path, urls: list[str], text: str = "a red barn") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": urls, "text": [text] * len(urls)}), folder / "x.parquet")


# ---------------------------------------------------------------- tables


@site("read")
def urls_csv_cell_of_a_million(folder: Path, url: Callable[..., str]) -> None:
    rows = f'{url("/ok")},"{"a" * 1_000_000}"\n' * 60
    (folder / "x.csv").write_text("url,text\n" + rows)


@site("refused")
def urls_csv_cell_of_8_mib(folder: Path, url: Callable[..., str]) -> None:
    (folder / "x.csv").write_text(f"url,text\n{url('/ok')},{'a' * (8 * MIB)}\n")


@site("refused")
def urls_csv_quote_never_closed(folder: Path, url: Callable[..., str]) -> None:
    (folder / "x.csv").write_text(f'url,text\n{url("/ok")},"a red barn\n' + f"{url('/ok')},two boats\n" * 10**6)


@site("refused")
def urls_csv_header_of_commas(folder: Path, url: Callable[..., str]) -> None:
    (folder / "x.csv").write_bytes(b"url,text" + b"," * (64 * MIB))


@site("refused")
def urls_csv_of_blank_lines(folder: Path, url: Callable[..., str]) -> None:
    (folder / "x.csv").write_bytes(b"url,text\n" + b"\n" * (256 * MIB))


@site("refused")
def urls_csv_of_empty_rows(folder: Path, url: Callable[..., str]) -> None:
    (folder / "x.csv").write_bytes(b"url,text\n" + b",a\n" * (64 * MIB))


@site("refused")
def urls_csv_of_32_gib(folder: Path, url: Callable[..., str]) -> None:
    sparse(folder / "x.csv", b"url,text\nhttps://a.test/1.png,a barn\n", 32 * 2**30)


@site("refused")
def urls_parquet_of_one_url(folder: Path, url: Callable[..., str]) -> None:
    """A URL of 1 MiB, 4,096 times in 22 kB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    long = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), pa.array([url("/" + "a" * MIB)]))
    table = pa.table({"url": long, "text": ["a"] * 4096})
    pq.write_table(table, folder / "x.parquet", compression="zstd", store_schema=False)


@site("refused")
def urls_parquet_caption_page_of_1_gib(folder: Path, url: Callable[..., str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"url": [url("/ok")] * 32, "text": pa.array(["a" * (32 * MIB)] * 32)})
    pq.write_table(table, folder / "x.parquet", compression="zstd", use_dictionary=False)


# ---------------------------------------------------------------- answers


@site("read", PATIENT)
def sites_bodies_without_end(folder: Path, url: Callable[..., str]) -> None:
    """All concurrently, each from another host: 3 GiB in total before each exceeds its limit."""
    _table(folder, [url("/endless", f"h{i}.test") for i in range(96)])


@site("read", PATIENT)
def sites_bodies_at_the_cap(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/cap", f"h{i}.test") for i in range(32)])


@site("read")
def sites_a_byte_at_a_time(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/slow", f"h{i}.test") for i in range(_ROWS)])


@site("read")
def sites_chunks_of_a_byte(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/chunks", f"h{i}.test") for i in range(8)])


@site("read")
def sites_headers_without_end(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/headers", f"h{i}.test") for i in range(_ROWS)])


@site("read")
def sites_interim_answers_without_end(folder: Path, url: Callable[..., str]) -> None:
    """100 Continue, again and again."""
    _table(folder, [url("/interim", f"h{i}.test") for i in range(8)])


@site("read", PATIENT)
def sites_gzip_bombs(folder: Path, url: Callable[..., str]) -> None:
    """1 GiB of zeros in 1 MiB, once as the encoding of an image and once as its content."""
    _table(folder, [url(path, f"h{i}.test") for i in range(64) for path in ("/gzip", "/gzipped")])


@site("read")
def sites_redirect_loops(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/loop", f"h{i % 16}.test") for i in range(_ROWS)])


@site("read")
def sites_redirects_of_60_kb(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/long", f"h{i % 16}.test") for i in range(_ROWS)])


@site("read")
def sites_redirects_inside(folder: Path, url: Callable[..., str]) -> None:
    """To the loopback, to private and link-local addresses, to files and to names that have such addresses."""
    _table(folder, [url(f"/inside/{i}", f"h{i % 16}.test") for i in range(_ROWS)])


# ---------------------------------------------------------------- robots.txt


@site("read", ROBOTS)
def robots_of_gigabytes(folder: Path, url: Callable[..., str]) -> None:
    _table(folder, [url("/ok", f"endless{i}.test") for i in range(_ROWS)])


@site("read", ROBOTS)
def robots_of_agents(folder: Path, url: Callable[..., str]) -> None:
    """Half of 500 KiB are agents of one group, half are its rules."""
    _table(folder, [url("/ok", f"agents{i}.test") for i in range(16)])


@site("read", ROBOTS)
def robots_of_stars(folder: Path, url: Callable[..., str]) -> None:
    """38,000 patterns, and URLs that nearly match."""
    _table(folder, [url(f"/ok?{'z' * 8000}{i}", "stars.test") for i in range(_ROWS)])


@site("read", ROBOTS)
def robots_of_many_sites(folder: Path, url: Callable[..., str]) -> None:
    """A large one for each of 20 hosts: 10 MiB, which would be 500 MiB when parsed. Each takes a second to parse."""
    _table(folder, [url("/ok", f"stars{i}.test") for i in range(20)])


# ---------------------------------------------------------------- the server


@functools.cache
def _robots(of_agents: bool) -> bytes:
    if of_agents:
        agents = "".join(f"useragent:{i:x}\n" for i in range(16_000))
        return (agents + "allow:/\n" * ((500 * 2**10 - len(agents)) // 8)).encode()
    return ("user-agent:*\n" + "".join(f"allow:*z{i:x}\n" for i in range(38_000))).encode()


INSIDE = ("http://127.0.0.2:{port}/ok", "http://10.0.0.1/a", "http://169.254.169.254/latest/meta-data", "http://[::1]/a",
          "file:///etc/passwd", "http://inside.test:{port}/ok", "gopher://a.test/")  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bomb = gzip.compress(bytes(16 * MIB)) * 64

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            host, path = self.headers["host"].partition(":")[0], self.path.partition("?")[0]
            name, _, number = path[1:].partition("/")
            self.close_connection = True
            if name == "robots.txt":
                if host.startswith("endless"):
                    self._endless("text/plain", b"allow: /a\n" * 6000)
                elif host.startswith(("agents", "stars")):
                    self._answer(_robots(host.startswith("agents")), {"content-type": "text/plain"})
                else:
                    self._answer(b"", {}, 404)
            elif name == "ok":
                self._answer(picture())
            elif name == "cap":
                self._answer(bytes(32 * MIB))
            elif name == "endless":
                self._endless("image/png", PIECE)
            elif name == "slow":
                self._head({"content-length": "1000"})
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.5)
            elif name == "chunks":
                self._head({"transfer-encoding": "chunked"})
                while True:
                    self.wfile.write(b"1\r\nx\r\n" * 10_000)
            elif name == "headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.wfile.write(b"x-a: " + b"a" * 1000 + b"\r\n")
            elif name == "interim":
                while True:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)
            elif name in ("gzip", "gzipped"):
                self._answer(self.bomb, {"content-encoding": "gzip"} if name == "gzip" else {})
            else:
                to = {"loop": "/loop", "long": "/long?" + "a" * 60_000}.get(name) or INSIDE[int(number) % len(INSIDE)]
                self._answer(b"", {"location": to.replace("{port}", str(self.server.server_address[1]))}, 302)

    def _head(self, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"content-type": "image/png", "connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._head({"content-length": str(len(data))} | (headers or {}), status)
        self.wfile.write(data)

    def _endless(self, kind_of: str, piece: bytes) -> None:
        self._head({"content-type": kind_of})
        while True:
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """The port of the server."""
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def build(name: str, folder: Path, port: int) -> None:
    KINDS[name][1](folder, lambda path, host="images.test": f"http://{host}:{port}{path}")


# ---------------------------------------------------------------- reading


def reach(port: int) -> None:
    """Lets this process reach the server but no other private address: names below .test resolve to it."""
    from tasks.curation.sources.urls import network

    def getaddrinfo(host: str | bytes, at: int, *_: object, **__: object) -> list:
        name = host.decode() if isinstance(host, bytes) else str(host)
        address = "10.0.0.7" if name == "inside.test" else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, at))]

    socket.getaddrinfo = getaddrinfo
    network.EXTRA_NETWORKS = (ipaddress.ip_network("127.0.0.1/32"),)
    network.PORTS = frozenset({80, 443, port})


def download(name: str, folder: str, out: Path) -> str:
    """Lists, downloads and reads a source of URLs, as the workflow's tasks do; returns the outcome of the rows."""
    from collections import Counter

    import pyarrow.parquet as pq

    from tasks.curation.sources.base import Account, open_corpus
    from tasks.curation.sources.file_trees import at
    from tasks.curation.sources.urls import shards

    config = SourceConfig(urls=SITES[name])
    listed = out / "listed"
    listed.mkdir(parents=True)
    report = shards.write_listing(config, folder, listed)
    _, ranges = shards.read_listing(listed)
    parts = []
    for chosen, shard in ranges:
        part = out / shard
        part.mkdir()
        shards.write_shard(at(report["root"]), chosen, shard, config, out / f"work-{shard}", part)
        parts.append(part)
    (out / "corpus").mkdir()
    shards.write_corpus(parts, [str(part) for part in parts], report, out / "corpus")
    corpus, total, size = open_corpus(out / "corpus"), Account(), 0
    for one in corpus.shards():
        account = Account()
        for record in corpus.read(one, account):
            size += len(record.data)
        total += account
    rules: Counter[str] = Counter()
    for part in parts:
        for path in part.glob("*.parquet"):
            if path.name != "shards.parquet":
                rules.update(pq.read_table(path, columns=["rule"])["rule"].to_pylist())
    assert total.records == report["images"] == sum(rules.values())
    result = ", ".join(f"{count} x {rule or 'downloaded'}" for rule, count in rules.most_common())
    return f"{total.records} rows, {size:,} bytes: {result}"
