"""Downloads images by URL: from many hosts at a time with few requests each, within limits, obeying robots.txt, never
from private networks.

    (row, URL) --check--> robots.txt --> GET --redirect--> check ... --> bytes, or a rule of the ledger and why
                             |            429, 5xx, timeout: again, later
                             one for each origin

Nothing is decompressed here, cookies are not kept, and the environment (proxies, .netrc) is not used.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urljoin

from tasks.curation.config import UrlConfig
from tasks.curation.http_retries import LONGEST_WAIT_S, retry_after_s, wait_s
from tasks.curation.sources.base import visible
from tasks.curation.sources.urls import network, robots

if TYPE_CHECKING:
    import httpcore

INVALID, FORBIDDEN, ROBOTS, GONE, FAILED, TOO_LARGE, TYPE, REDIRECTS = (
    "url_invalid",  # not a URL that may be fetched
    "url_forbidden",  # a non-public address or port, at any hop
    "url_robots",  # robots.txt or X-Robots-Tag
    "url_gone",  # the server answers 4xx
    "url_failed",  # no answer, 429 or 5xx, at every attempt
    "url_too_large",
    "url_type",  # an answer that is not an image
    "url_redirects",  # too many redirects
)
HOSTS_KNOWN = 20_000  # hosts whose robots.txt and pace are in memory
MAX_DELAY_S = 30.0  # maximum Crawl-delay
ROBOTS_CHARS = 4 * 2**20  # characters of parsed robots.txt in memory, which take about 50 times as many bytes
ROBOTS_EXTRA = 1000  # minimum for each, in characters
SPOOL_BYTES = 256 * 2**10  # bytes of an answer in memory; a larger one is on disk, so that `concurrency` answers fit
WINDOW = 4  # URLs that wait for their host, per concurrent request
PASSING = {408, 425, 429}
REDIRECT = {301, 302, 303, 307, 308}


class Fetched(NamedTuple):
    """The outcome of a URL: its bytes, or the rule by which it is left out, and one sentence.

    body: the bytes, in memory or on disk; the caller closes it. url: after redirects. status: of the last answer, 0 if
    there was none. attempts: including all redirects.
    """

    body: BinaryIO | None = None
    content_type: str = ""
    url: str = ""
    status: int = 0
    rule: str = ""
    detail: str = ""
    attempts: int = 1

    def pieces(self) -> Iterator[bytes]:
        """Yields the body once, and closes it."""
        if self.body is not None:
            with self.body:
                self.body.seek(0)
                while piece := self.body.read(SPOOL_BYTES):
                    yield piece


class _Again(Exception):
    """A failed attempt that may be repeated."""

    def __init__(self, detail: str, status: int = 0, after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.after_s = status, after_s


class _Host:
    def __init__(self, requests: int) -> None:
        self.slots = asyncio.Semaphore(requests)
        self.next_at = 0.0  # time of the loop's clock before which no request is sent
        self.delay_s = 0.0
        self.rules: asyncio.Future[robots.Rules] | None = None
        self.users = 0


class Fetcher:
    """Fetches URLs under one configuration; an asynchronous context manager.

    Args:
        directory: for answers on disk; None: the default directory of temporary files.
    """

    def __init__(self, config: UrlConfig, directory: Path | None = None) -> None:
        self.config, self._directory = config, directory
        self._parsed: OrderedDict[_Host, int] = OrderedDict()  # hosts with a robots.txt in memory, and its size
        self._hosts: OrderedDict[tuple[str, str, int | None], _Host] = OrderedDict()
        self._requests = asyncio.Semaphore(config.concurrency)

    async def __aenter__(self) -> Fetcher:
        self._pool = network.make_pool(self.config.concurrency)
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._pool.__aexit__(*error)

    async def fetch_all(self, urls: Iterable[tuple[int, str]]) -> AsyncIterator[tuple[int, Fetched]]:
        """(row, outcome) of every (row, URL), in the order in which they finish."""
        waiting: set[asyncio.Task[tuple[int, Fetched]]] = set()

        async def one(row: int, url: str) -> tuple[int, Fetched]:
            return row, await self.fetch(url)

        try:
            for row, url in urls:
                waiting.add(asyncio.create_task(one(row, url)))
                while len(waiting) >= WINDOW * self.config.concurrency:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in waiting:
                task.cancel()

    async def fetch(self, url: str) -> Fetched:
        again: _Again | None = None
        for attempt in range(1, self.config.max_retries + 2):
            if again is not None:
                await asyncio.sleep(wait_s(attempt - 2, min(again.after_s or 0.0, LONGEST_WAIT_S)))
            try:
                return (await self._follow(url))._replace(attempts=attempt)
            except _Again as error:
                again = error
        assert again is not None
        attempts = self.config.max_retries + 1
        detail = f"{again} ({attempts} attempts)"
        return Fetched(url=url, status=again.status, rule=FAILED, detail=detail, attempts=attempts)

    async def _follow(self, url: str) -> Fetched:
        """The answer at the end of the redirects.

        Raises:
            _Again: another attempt may succeed.
        """
        for _ in range(self.config.max_redirects + 1):
            try:
                parsed = network.check_url(url, self.config.allow_http)
                origin = (parsed.scheme, parsed.raw_host.decode(), parsed.port)
                with _Using(self._hosts, origin, self.config.per_host) as host:
                    if self.config.obey_robots and not (rules := await self._rules(host, str(parsed))).allows(
                        str(parsed)
                    ):
                        why = f"takes over {robots.MATCH_S:g} s to match" if rules.took_too_long else "forbids it"
                        return Fetched(url=url, rule=ROBOTS, detail=f"robots.txt {why}")
                    response = await self._get(host, parsed, self.config.max_bytes)
            except network.InvalidUrlError as error:
                return Fetched(url=url, rule=INVALID, detail=str(error))
            except network.ForbiddenError as error:
                return Fetched(url=url, rule=FORBIDDEN, detail=str(error))
            if response.status not in REDIRECT or response.rule:
                return response
            url = response.url
        return Fetched(url=url, rule=REDIRECTS, detail=f"more than {self.config.max_redirects} redirects")

    async def _rules(self, host: _Host, url: str) -> robots.Rules:
        """The site's robots.txt, fetched once for all waiting URLs. If it cannot be read, everything is forbidden, as
        in RFC 9309; another attempt at a URL fetches it again."""
        if host.rules is None:
            host.rules = asyncio.get_running_loop().create_future()
            try:
                rules = await self._fetch_rules(host, urljoin(url, "/robots.txt"))
            except BaseException as error:
                waiting, host.rules = host.rules, None
                waiting.set_exception(error if isinstance(error, Exception) else _Again("robots.txt was not read"))
                waiting.exception()  # retrieved, else asyncio warns if no caller awaits it
                raise
            host.delay_s = min(rules.delay_s(), MAX_DELAY_S)
            host.rules.set_result(rules)
            self._keep(host, rules.size)
        elif host in self._parsed:
            self._parsed.move_to_end(host)
        return await host.rules

    def _keep(self, host: _Host, size: int) -> None:
        """Stores the rules of a host, and drops the least recently used ones, which would be fetched again."""
        self._parsed[host] = size + ROBOTS_EXTRA
        while len(self._parsed) > 1 and sum(self._parsed.values()) > ROBOTS_CHARS:
            self._parsed.popitem(last=False)[0].rules = None

    async def _fetch_rules(self, host: _Host, url: str) -> robots.Rules:
        agent = self.config.user_agent
        for _ in range(self.config.max_redirects + 1):
            parsed = network.check_url(url, self.config.allow_http)
            response = await self._get(host, parsed, robots.MAX_ROBOTS_BYTES, is_image=False)
            if response.status in REDIRECT and not response.rule:
                url = response.url
            elif response.status == 200 and not response.rule:
                return robots.Rules(agent, b"".join(response.pieces()).decode("utf-8", "replace"))
            else:
                return robots.Rules(agent, allowed=response.rule == GONE)
        return robots.Rules(agent)  # RFC 9309: as if there were none

    async def _get(self, host: _Host, url: Any, limit: int, is_image: bool = True) -> Fetched:
        """One request, without following redirects; returns the URL of a redirect.

        Raises:
            _Again, network.ForbiddenError
        """
        import httpcore

        async with host.slots:
            loop = asyncio.get_running_loop()
            while (left_s := host.next_at - loop.time()) > 0:
                await asyncio.sleep(left_s)
            host.next_at = loop.time() + host.delay_s
            try:
                async with self._requests, asyncio.timeout(self.config.timeout_s):
                    return await self._request(host, url, limit, is_image)
            except TimeoutError:
                raise _Again(f"no whole answer in {self.config.timeout_s:g} s") from None
            except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
                raise _Again(visible(f"{type(error).__name__}: {error}")[:300]) from None

    async def _request(self, host: _Host, url: Any, limit: int, is_image: bool) -> Fetched:
        import httpcore

        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [
            (b"Host", url.netloc),
            (b"User-Agent", self.config.user_agent.encode()),
            (b"Accept", b"image/*" if is_image else b"text/plain,*/*;q=0.5"),
            (b"Accept-Encoding", b"identity"),
        ]
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), self.config.timeout_s)
        request = httpcore.Request("GET", target, headers=headers, extensions={"timeout": timeout})
        response = await self._pool.handle_async_request(request)
        try:
            return await self._read(host, response, str(url), limit, is_image)
        finally:
            await response.aclose()

    async def _read(self, host: _Host, response: httpcore.Response, url: str, limit: int, is_image: bool) -> Fetched:
        status = response.status
        fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers]
        named = dict(reversed(fields))
        answer = Fetched(url=url, status=status)
        if status in REDIRECT and "location" in named:
            try:
                return answer._replace(url=urljoin(url, named["location"]))
            except ValueError as error:  # such as http://[
                where = visible(named["location"])[:200]
                raise network.InvalidUrlError(f"a redirect to {where}, which is no URL: {error}") from None
        if status in PASSING or status >= 500:
            after_s = retry_after_s(named.get("retry-after"))
            if status in (429, 503) and after_s:  # the whole host, not only this URL
                host.next_at = max(host.next_at, asyncio.get_running_loop().time() + min(after_s, LONGEST_WAIT_S))
            raise _Again(f"HTTP {status}", status, after_s)
        if status >= 400:
            return answer._replace(rule=GONE, detail=f"HTTP {status}")
        if status != 200:
            return answer._replace(rule=FAILED, detail=f"HTTP {status}, which is not an answer to a plain request")
        kind = named.get("content-type", "").partition(";")[0].strip().lower()
        if is_image:
            if self.config.obey_robots:
                tags = [value for name, value in fields if name == "x-robots-tag"]
                directive = robots.forbidden_by_tag(tags, self.config.robots_directives, self.config.user_agent)
                if directive:
                    return answer._replace(rule=ROBOTS, detail=f"X-Robots-Tag: {visible(directive)}")
            if not kind.startswith(self.config.content_types):
                return answer._replace(rule=TYPE, detail=f"content type {visible(kind)[:100] or 'not given'}")
        if named.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return answer._replace(rule=TYPE, detail=f"content encoding {visible(named['content-encoding'])[:100]}")
        too_large = answer._replace(rule=TOO_LARGE, detail=f"more than {limit:,} bytes")
        length = named.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            return too_large
        body = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=self._directory)  # noqa: SIM115  (the answer's)
        size = 0
        try:
            async for piece in response.aiter_stream():
                size += len(piece)
                if size > limit:
                    body.close()
                    return too_large
                body.write(piece)
        except BaseException:
            body.close()
            raise
        return answer._replace(body=body, content_type=kind)


class _Using:
    """A host in use; if there are too many, unused hosts are dropped, the oldest first."""

    def __init__(self, hosts: OrderedDict, origin: tuple, requests: int) -> None:
        self._hosts, self._origin = hosts, origin
        if origin not in hosts:
            hosts[origin] = _Host(requests)
        self._host = hosts[origin]
        hosts.move_to_end(origin)

    def __enter__(self) -> _Host:
        self._host.users += 1
        return self._host

    def __exit__(self, *_: object) -> None:
        self._host.users -= 1
        while len(self._hosts) > HOSTS_KNOWN:
            origin = next(iter(self._hosts))
            if self._hosts[origin].users:
                self._hosts.move_to_end(origin)
                break
            del self._hosts[origin]
