"""Images by URL: recovered or refused, never from private networks, all in the ledger, none downloaded twice after a
kill."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_site import image_site
from own_images import png

from tasks.curation import flow, http_retries
from tasks.curation.config import CaptionConfig, CaptionerConfig, CurationConfig, FilterConfig, SourceConfig, UrlConfig
from tasks.curation.curated import open_curated
from tasks.curation.sources.base import Account
from tasks.curation.sources.file_trees import find
from tasks.curation.sources.urls import fetch, network, robots, shards, tables
from tasks.curation.sources.urls.fetch import Fetched, Fetcher
from tasks.store import read_index

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05))


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    monkeypatch.setattr(http_retries, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def site(monkeypatch):
    with image_site(monkeypatch) as site:
        yield site


def urls(**changes) -> UrlConfig:
    return UrlConfig(**({"allow_http": True, "concurrency": 16, "timeout_s": 5.0, "max_retries": 2} | changes))


def fetched(url: str, **changes) -> Fetched:
    return all_fetched([url], **changes)[0]


def data(result: Fetched) -> bytes:
    return b"".join(result.pieces())


def all_fetched(wanted: list[str], **changes) -> list[Fetched]:
    async def work():
        async with Fetcher(urls(**changes)) as fetcher:
            return dict([pair async for pair in fetcher.fetch_all(enumerate(wanted))])

    actual = asyncio.run(work())
    return [actual[i] for i in range(len(wanted))]


def table_of(path: Path, wanted: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"URL": wanted, "text": [f"picture number {i}" for i in range(len(wanted))]}), path)
    return path


def ledger_of(curated: Path) -> pd.DataFrame:
    return pd.read_parquet(curated / "ledger.parquet")


def curate(path: Path, **changes) -> Path:
    source = SourceConfig(urls=urls(**changes), images_per_shard=30)
    return flow.curate_source(source, str(path), CONFIG)[0]


# ---------------------------------------------------------------- what is never fetched


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fec0::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1",
     "2002:7f00:1::", "64:ff9b::a00:1", "64:ff9b:1::1", "2001:db8::1", "fe80::1%eth0"],
)  # fmt: skip
def test_no_address_inside_is_public(address):
    assert not network.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address):
    assert network.is_public(address)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://127.0.0.1/a.png", "url_forbidden"), ("http://[::1]/a.png", "url_forbidden"),
        ("http://2130706433/a.png", "url_forbidden"), ("http://0x7f.1/a.png", "url_forbidden"),
        ("http://169.254.169.254/latest/meta-data/", "url_forbidden"), ("https://localhost/a.png", "url_forbidden"),
        ("https://1.1.1.1:22/", "url_forbidden"), ("file:///etc/passwd", "url_invalid"), ("ftp://a.test/b", "url_invalid"),
        ("https://user:secret@a.test/b", "url_invalid"), ("https:///b", "url_invalid"), ("", "url_invalid"),
        ("not a url", "url_invalid"), ("https://a.test:99999999/", "url_forbidden"), ("reference::https://a/b", "url_invalid"),
    ],
)  # fmt: skip
def test_what_is_no_public_web_address_is_refused_without_a_connection(url, rule, monkeypatch):
    async def never(*_, **__):
        raise AssertionError("a connection was made")

    import httpcore

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", never)
    result = fetched(url)
    assert result.rule == rule and result.detail and "secret" not in result.detail


def test_plain_http_needs_to_be_allowed(site):
    result = fetched(site.url("/ok/1.png"), allow_http=False)
    assert result.rule == "url_invalid" and "allow_http" in result.detail and not site.requests


def test_a_name_that_points_inside_is_refused_at_every_hop(site):
    site.addresses["inside.test"] = "10.0.0.7"
    assert fetched(site.url("/ok/1.png", "inside.test")).rule == "url_forbidden"
    hop = site.url("/redirect?to=" + quote(site.url("/ok/2.png", "inside.test")))
    result = fetched(hop)
    assert result.rule == "url_forbidden" and "10.0.0.7" in result.detail
    hop = site.url("/redirect?to=" + quote(f"http://127.0.0.2:{site.port}/ok/3.png"))
    assert fetched(hop).rule == "url_forbidden"
    assert not any(path.startswith("/ok") for path in site.requests)


def test_a_name_is_resolved_once_for_a_connection_so_that_it_cannot_move_after_the_check(site):
    answers = iter(["127.0.0.1"] + ["10.0.0.7"] * 9)
    site.addresses["moving.test"] = lambda: next(answers)
    result = fetched(site.url("/ok/1.png", "moving.test"), obey_robots=False)
    assert data(result) == png(1) and site.lookups["moving.test"] == 1
    assert fetched(site.url("/ok/2.png", "moving.test"), obey_robots=False).rule == "url_forbidden"


def test_no_proxy_of_the_environment_is_used(site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.2:9")
    assert data(fetched(site.url("/ok/1.png"))) == png(1)


# ---------------------------------------------------------------- limits


def test_redirects_are_followed_to_their_limit(site):
    def chain(count: int) -> str:
        url = site.url("/ok/7.png")
        for _ in range(count):
            url = site.url("/redirect?to=" + quote(url, safe=""))
        return url

    assert data(fetched(chain(3), max_redirects=3)) == png(7)
    assert fetched(chain(4), max_redirects=3).rule == "url_redirects"


def test_a_redirect_to_what_is_no_url_is_that_records_end_and_not_the_shards(site):
    wanted = [site.url("/redirect?to=" + quote(to, safe="")) for to in ("http://[", "https://[::1", "//[")]
    *bad, good = all_fetched([*wanted, site.url("/ok/7.png")])
    assert [actual.rule for actual in bad] == ["url_invalid"] * 3 and "http://[" in bad[0].detail
    assert data(good) == png(7)


@pytest.mark.slow
def test_oversized_slow_and_wrong_answers_are_refused(site):
    limits = {"max_bytes": 100_000, "timeout_s": 2.5, "max_retries": 0}
    result = all_fetched(
        [site.url(path) for path in ("/endless", "/slow", "/type", "/gzip", "/status/204", "/status/404")], **limits
    )
    assert [one.rule for one in result] == [
        "url_too_large",
        "url_failed",
        "url_type",
        "url_type",
        "url_failed",
        "url_gone",
    ]
    assert all(data(one) == b"" for one in result)
    assert fetched(site.url("/ok/1.png"), max_bytes=100).rule == "url_too_large"


def test_429_5xx_and_a_lost_connection_are_tried_again(site):
    result = all_fetched([site.url("/once500/1.png"), site.url("/once429/2.png"), site.url("/status/503")])
    assert [data(one) for one in result] == [png(1), png(2), b""]
    assert [one.attempts for one in result[:2]] == [2, 2]
    assert result[2].rule == "url_failed" and "503" in result[2].detail and site.requests["/status/503"] == 3
    site.addresses["gone.test"] = "127.0.0.2"
    network.EXTRA_NETWORKS = (*network.EXTRA_NETWORKS, ipaddress.ip_network("127.0.0.2/32"))
    assert fetched(site.url("/ok/1.png", "gone.test")).rule == "url_failed"


def test_a_host_gets_few_requests_at_a_time_and_others_go_on(site):
    wanted = [site.url(f"/ok/{i}.png", f"h{i % 3}.test") for i in range(60)]
    assert all(data(one) for one in all_fetched(wanted, per_host=2, concurrency=16))
    assert max(site.busy[f"h{i}.test"] for i in range(3)) == 2


# ---------------------------------------------------------------- what a site allows


def test_robots_txt_is_honoured_and_read_once_for_a_site(site):
    site.robots["a.test"] = (200, "User-agent: *\nDisallow: /ok/\nAllow: /ok/2*.png$\n")
    site.robots["b.test"] = (200, "User-agent: nucleus-flyte\nDisallow: /\n\nUser-agent: *\nAllow: /\n")
    wanted = [site.url(f"/ok/{i}.png", "a.test") for i in range(4)] + [site.url("/ok/5.png", "b.test")]
    assert [one.rule for one in all_fetched(wanted)] == ["url_robots", "url_robots", "", "url_robots", "url_robots"]
    assert site.requests["/robots.txt"] == 2
    assert [one.rule for one in all_fetched(wanted, obey_robots=False)] == [""] * 5
    assert site.requests["/robots.txt"] == 2


def test_a_site_whose_robots_txt_cannot_be_read_is_left_alone_and_one_without_is_open(site):
    site.robots["down.test"], site.robots["none.test"] = (503, ""), (403, "")
    assert fetched(site.url("/ok/1.png", "down.test")).rule == "url_failed"
    assert data(fetched(site.url("/ok/1.png", "none.test"))) == png(1)
    assert site.requests["/ok/1.png"] == 1


def test_robots_txt_is_asked_of_the_site_that_a_redirect_leads_to(site):
    site.robots["closed.test"] = (200, "User-agent: *\nDisallow: /\n")
    result = fetched(site.url("/redirect?to=" + quote(site.url("/ok/1.png", "closed.test"))))
    assert result.rule == "url_robots" and site.requests["/ok/1.png"] == 0


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("noai", "noai"), ("max-snippet: 50, NoImageAI", "noimageai"), ("none", "none"), ("index, follow", ""),
        ("otherbot: noai", ""), ("nucleus-flyte: noai", "noai"), ("*: noindex", "noindex"),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", ""),
    ],
)  # fmt: skip
def test_x_robots_tag_is_read_as_it_is_written(value, result):
    assert robots.forbidden_by_tag([value], UrlConfig().robots_directives, "nucleus-flyte/0.1") == result


def test_an_image_that_forbids_its_use_is_refused_unless_the_recipe_says_otherwise(site):
    url = site.url("/tag/1.png?value=noai")
    assert fetched(url).rule == "url_robots" and not data(fetched(url))
    assert data(fetched(url, obey_robots=False)) == png(1)
    assert data(fetched(url, robots_directives=("noimageindex",))) == png(1)


# ---------------------------------------------------------------- the corpus


@pytest.mark.slow
def test_every_url_is_in_the_ledger_recovered_or_refused(site, tmp_path):
    site.addresses["inside.test"] = "192.168.0.1"
    wanted = [site.url(f"/ok/{i}.png", f"h{i % 4}.test") for i in range(40)]
    wanted += [site.url(f"/once500/{i}.png") for i in range(40, 46)]  # a tenth
    bad = {
        site.url("/ok/99.png", "inside.test"): "url_forbidden",
        site.url("/status/404"): "url_gone",
        site.url("/status/500"): "url_failed",
        site.url("/endless"): "url_too_large",
        site.url("/slow"): "url_failed",
        site.url("/type"): "url_type",
        site.url("/tag/1.png?value=noai"): "url_robots",
        "ftp://a.test/b.png": "url_invalid",
    }
    table_of(tmp_path / "source" / "urls.parquet", wanted + list(bad))
    (tmp_path / "source" / "readme.md").write_text("not a table")
    curated = curate(tmp_path / "source", max_bytes=100_000, timeout_s=2.5, max_retries=1)
    book = ledger_of(curated)
    assert len(book) == len(wanted) + len(bad)
    assert book["file"].tolist() == wanted + list(bad)
    assert book.set_index("file")["rule"].to_dict() == dict.fromkeys(wanted, "") | bad
    report = json.loads((curated / "report.json").read_text())
    assert report["kept"] == 46 and "readme.md" in report["account"]["left_out"]
    read = open_curated(curated)
    images = [record.data for part in read.parts() for _, record in read.images(part)]
    assert images == [png(i) for i in range(46)]
    (texts,) = {tuple(read.selection(part)["captions"].to_pylist()[0]) for part in list(read.parts())[:1]}
    assert texts == ("picture number 0",)
    assert site.agents == {"nucleus-flyte/0.1"}


@pytest.mark.slow
def test_csv_and_parquet_tables_give_the_same_images_by_the_recipes_columns(site, tmp_path):
    lines = ["link,alt\r\n"] + [f'{site.url(f"/ok/{i}.png")},"a picture, number {i},\nof a set"\r\n' for i in range(5)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "urls.csv").write_text("".join(lines), newline="")
    source = SourceConfig(urls=urls(column="link"), caption_columns=("alt",), images_per_shard=2)
    curated, _ = flow.curate_source(source, str(tmp_path / "a"), CONFIG)
    read = open_curated(curated)
    captions = [text for part in read.parts() for text in read.selection(part)["captions"].to_pylist()]
    assert captions == [[f"a picture, number {i}, of a set"] for i in range(5)]
    assert len(list(read_index(curated))) == 3
    with pytest.raises(ValueError, match="it needs one of URLs \\(url\\).*source.urls.column"):
        flow.curate_source(SourceConfig(urls=urls()), str(tmp_path / "a"), CONFIG)


def test_a_table_of_urls_is_not_downloaded_unless_the_recipe_says_so(site, tmp_path):
    table_of(tmp_path / "source" / "urls.parquet", [site.url("/ok/1.png")])
    with pytest.raises(ValueError, match="source.urls"):
        flow.curate_source(SourceConfig(), str(tmp_path / "source"), CONFIG)
    assert not site.requests


def test_a_small_table_that_repeats_a_long_caption_is_refused_before_it_fills_memory(tmp_path):
    caption = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 100_000]))
    (tmp_path / "urls").mkdir()
    table = pa.table({"URL": ["https://images.test/a.png"] * 1000, "text": caption})
    pq.write_table(table, tmp_path / "urls" / "u.parquet", compression="zstd")
    assert (tmp_path / "urls" / "u.parquet").stat().st_size < 50_000
    place, source = find(str(tmp_path / "urls")), SourceConfig(urls=urls())
    (chosen,) = tables.ranges(place, source, Account())
    with pytest.raises(ValueError, match=r"u.parquet: rows 0 to 670 have more than 64 MiB .*images_per_shard"):
        list(tables.rows(place, chosen, source))


@pytest.mark.slow
def test_the_shards_have_img2datasets_layout_and_are_read_as_such(site, tmp_path):
    table_of(
        tmp_path / "source" / "urls.parquet", [site.url("/ok/1.png"), site.url("/status/404"), site.url("/ok/2.png")]
    )
    curate(tmp_path / "source")
    (tar,) = (tmp_path / "home" / "artifacts" / "records").glob("*/*.tar")
    with tarfile.open(tar) as archive:
        assert archive.getnames() == [f"{row:09d}.{ext}" for row in (0, 2) for ext in ("png", "txt", "json")]
        sidecar = json.load(archive.extractfile("000000002.json"))
    assert sidecar["url"] == site.url("/ok/2.png") and sidecar["status"] == "success"
    rows = pd.read_parquet(tar.with_suffix(".parquet"))
    assert rows["status"].tolist() == ["success", "failed_to_download", "success"]
    moved = tmp_path / "moved"
    moved.mkdir()
    os.link(tar, moved / "00000.tar")
    plain, _ = flow.curate_source(SourceConfig(), str(moved), CONFIG)  # as a folder of tars
    read = open_curated(plain)
    assert [text for part in read.parts() for text in read.selection(part)["captions"].to_pylist()] == [
        ["picture number 0"],
        ["picture number 2"],
    ]


@pytest.mark.slow
def test_tars_of_img2dataset_itself_are_read_as_they_are(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    keys = [f"00000{i:04d}" for i in range(3)]
    rows = [{"url": f"https://a.test/{key}.png", "key": key, "status": "success", "caption": f"a picture {key}",
             "error_message": None, "width": 128, "height": 96, "exif": "{}", "sha256": "0" * 64} for key in keys]  # fmt: skip
    with tarfile.open(source / "00000.tar", "w") as tar:
        for i, row in enumerate(rows):
            for name, data in (
                (f"{row['key']}.png", png(i)),
                (f"{row['key']}.txt", row["caption"].encode()),
                (f"{row['key']}.json", json.dumps(row).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    failed = rows[0] | {"key": "000009999", "status": "failed_to_download", "error_message": "HTTP 404"}
    pq.write_table(pa.Table.from_pylist([*rows, failed]), source / "00000.parquet")
    (source / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3, "status_dict": {"HTTP 404": 1}}))
    curated, _ = flow.curate_source(SourceConfig(), str(source), CONFIG)
    read = open_curated(curated)
    captions = [text for part in read.parts() for text in read.selection(part)["captions"].to_pylist()]
    assert captions == [[row["caption"]] for row in rows]
    left_out = json.loads((curated / "report.json").read_text())["account"]["left_out"]
    assert "00000.parquet" in left_out and "00000_stats.json" in left_out


@pytest.mark.slow
def test_the_same_list_is_downloaded_once_and_a_new_number_downloads_again(site, tmp_path):
    path = table_of(tmp_path / "source" / "urls.parquet", [site.url(f"/ok/{i}.png") for i in range(4)])
    curate(path.parent)
    curate(path.parent, per_host=1)
    assert set(site.answered.values()) == {1}
    curate(path.parent, download=1)
    assert {count for name, count in site.answered.items() if name.startswith("/ok")} == {2}


@pytest.mark.slow
def test_killed_in_the_middle_what_was_downloaded_is_not_downloaded_again(site, tmp_path):
    path = table_of(
        tmp_path / "source" / "urls.parquet", [site.url(f"/ok/{i}.png", f"h{i % 5}.test") for i in range(25)]
    )
    code = f"""
import os, signal
from image_site import Site, reach
from {__name__} import curate
from pathlib import Path
from tasks.curation import journal
from tasks.curation.sources.urls import network
import pytest
site = Site(); site.port = {site.port}
reach(pytest.MonkeyPatch(), network, site)
real, count = journal.Journal.add, 0
def add(self, row):
    global count
    real(self, row)
    count += 1
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.add = add
curate(Path({str(path.parent)!r}), concurrency=4)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-3000:]
    (journal,) = (tmp_path / "home" / "runs").glob("*/journal.jsonl")
    known = {json.loads(line)["final_url"].partition(str(site.port))[2] for line in journal.read_bytes().splitlines()}
    assert len(known) == 12
    with open(journal.with_name("bytes.bin"), "ab") as file:
        file.write(b"half an image")
    curated = curate(path.parent, concurrency=4)
    assert {site.answered[name] for name in known} == {1}
    read = open_curated(curated)
    assert [record.data for part in read.parts() for _, record in read.images(part)] == [png(i) for i in range(25)]
    assert not journal.parent.exists()


# ---------------------------------------------------------------- tables as CSV


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("u.csv", 'url,text\nhttps://a/1.png,"a barn\nhttps://a/2.png,boats\nhttps://a/3.png,"red"\n', ["line 2", "quotes"]),
        ("u.csv", 'url,text\nhttps://a/1.png,"a barn\nhttps://a/2.png,"\n', ["line 2", "runs over", "https://a/2.png"]),
        ("u.csv", 'text,url\n"a barn,https://a/1.png\nboats",https://a/2.png\n', ["line 2", "runs over"]),
        ("u.csv", 'url,text\nhttps://a/1.png,"Stop" says a sign\n', ["line 2", "quotes"]),
        ("u.csv", "url,text\nhttps://a/1.png,a barn, red\n", ["line 2", "3 fields"]),
        ("u.csv", "url,text,\nhttps://a/1.png,a barn, red\n", ["line 2", "column 3"]),
        ("u.tsv", "url\ttext\nhttps://a/1.png\n", ["line 2", "1 field"]),
        ("u.csv", "url,text,text\nhttps://a/1.png,a,b\n", ["there twice"]),
        ("u.csv", "a,b,c,d,e,f,g,h,i,j,k,l,m,n\n", ["columns a, b", "k, l and 2 more; it needs one of URLs"]),
        ("u.csv", "url,text\nhttps://a/1.png,caf\xe9\n", ["not a readable table"]),
        ("u.csv", "\n\n", ["no header"]),
        ("u.csv", "url,text" + "," * 9_999 + "\n", ["10,001 columns", "at most 10,000 are read"]),
    ],
)  # fmt: skip
def test_a_csv_of_urls_that_may_lose_a_row_or_cut_a_caption_is_refused_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    config = SourceConfig(urls=urls())
    with pytest.raises(ValueError) as caught:
        place = find(str(tmp_path))
        [list(tables.rows(place, chosen, config)) for chosen in tables.ranges(place, config, Account())]
    assert name in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def csv_rows(folder, content: str) -> list[tables.UrlRow]:
    (folder / "u.csv").write_text(content)
    place, config = find(str(folder)), SourceConfig(urls=urls(), images_per_shard=3)
    return [row for one in tables.ranges(place, config, Account()) for row in tables.rows(place, one, config)]


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("url,caption,similarity", "https://a/1,a barn, 0.3", ["'0.3'", "'similarity' (column 3)", "captions"]),
        ("url,caption,w", "https://e.org/a,b.jpg,x", ["'b.jpg'", "'caption' (column 2)", "URLs"]),
        ("url,caption,w", "https://e.org/a,b.jpg?s=1,x", ["'b.jpg?s=1'", "URLs"]),
        ("url,caption,w", "https://e.org/full/600,/0/default.jpg,x", ["'/0/default.jpg'", "URLs"]),
    ],
)
def test_a_row_of_a_csv_of_urls_that_may_cut_its_caption_or_url_is_a_problem_of_its_record(
    tmp_path, header, row, words
):
    first, second = csv_rows(tmp_path, f"{header}\n{row}\nhttps://a/2.jpg,boats,1\n")
    assert (first.captions, second) == ([], tables.UrlRow(1, "https://a/2.jpg", ["boats"]))
    assert first.url == row.partition(",")[0] and first.problem.startswith("u.csv, line 2, has ")
    assert all(word in first.problem for word in [*words, "between double quotes", "Parquet"])


@pytest.mark.parametrize(
    ("header", "row", "caption"),
    [
        ("url,title,caption", "https://a/1, Home page,a barn", "a barn"),
        ("url,caption,w", '"https://e.org/a,b.jpg",a barn,x', "a barn"),
        ("url,caption,w", '"https://e.org/a",b.jpg,x', "b.jpg"),
        ("url,caption", "https://e.org/a.jpg?s=1,IMG_7.jpg", "IMG_7.jpg"),
        ("url,file,caption", "https://e.org/7,7.jpg,a barn", "a barn"),
        ("url,caption", "https://e.org/7,/ and .jpg", "/ and .jpg"),
    ],
)
def test_well_formed_rows_of_a_csv_of_urls_are_read(tmp_path, header, row, caption):
    assert [(one.captions, one.problem) for one in csv_rows(tmp_path, f"{header}\n{row}\n")] == [([caption], "")]


def test_a_blank_in_every_row_behind_the_captions_of_a_csv_of_urls_is_a_habit_in_each_range(tmp_path):
    lines = [f"https://a/{i},barn {i}, 0.{i}\n" for i in range(10)]
    rows = csv_rows(tmp_path, "".join(["url,caption,similarity\n", *lines]))
    assert [(row.captions, row.problem) for row in rows] == [([f"barn {i}"], "") for i in range(10)]
    rows = csv_rows(tmp_path, "".join(["url,caption,similarity\n", *lines, "https://a/x,barn,1\n"]))
    assert [bool(row.problem) for row in rows] == [True] * 10 + [False]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ('\ufeffurl,text\r\nhttps://a/1,"caf\xe9,\r\n""old"""\r\nhttps://a/2,\r\n'.encode(), None),
        ('url;text\nhttps://a/1;"caf\xe9,\r\n""old"""\n\nhttps://a/2;\n'.encode(), "cp1252"),
        ('url,text\nhttps://a/1,"caf\xe9,\r\n""old"""\nhttps://a/2,\n'.encode("cp1252"), "cp1252"),
        ('url\ttext\nhttps://a/1\t"caf\xe9,\r\n""old"""\nhttps://a/2\t\n'.encode("utf-16"), None),
    ],
)
def test_a_csv_of_urls_is_read_whole_by_its_mark_then_utf8_then_the_recipes_encoding(tmp_path, content, encoding):
    (tmp_path / "u.csv").write_bytes(content)
    config = SourceConfig(urls=urls(), encoding=encoding, images_per_shard=1)
    place = find(str(tmp_path))
    result = [row for one in tables.ranges(place, config, Account()) for row in tables.rows(place, one, config)]
    assert [(row.row, row.url) for row in result] == [(0, "https://a/1"), (1, "https://a/2")]
    assert [row.captions for row in result] == [['café,\r\n"old"'], []]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_of_urls_without_captions_is_refused_only_where_captions_are_needed(tmp_path, form):
    (tmp_path / "source").mkdir()
    if form == "csv":
        (tmp_path / "source" / "u.csv").write_text("url,label\nhttps://a.test/1.png,barn\n")
    else:
        pq.write_table(pa.table({"url": ["https://a.test/1.png"], "label": ["barn"]}), tmp_path / "source/u.parquet")
    config = SourceConfig(urls=urls())
    with pytest.raises(ValueError, match=rf"u\.{form} has columns url, label; it needs a caption column"):
        flow.write_listing(config, str(tmp_path / "source"), tmp_path, CurationConfig().needs_captions)
    free = CurationConfig(captions=CaptionConfig(required=False))
    assert not free.needs_captions and not CurationConfig(captioner=CaptionerConfig(name="openai")).needs_captions
    report = flow.write_listing(config, str(tmp_path / "source"), tmp_path, free.needs_captions)
    assert report["images"] == 1
    ((row, name),) = shards.read_listing(tmp_path)[1]
    assert [(one.url, one.captions) for one in tables.rows(find(str(tmp_path / "source")), row, config)] == [
        ("https://a.test/1.png", [])
    ]


# ---------------------------------------------------------------- hostile sites (benchmarks/curation/hostile_urls.py has more)


def test_row_groups_without_rows_of_a_table_of_urls_change_nothing(tmp_path):
    table = pa.table({"url": [f"https://a.b/{i}.png" for i in range(5)], "text": [f"t{i}" for i in range(5)]})
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
        for at, size in ((0, 0), (0, 2), (2, 0), (2, 3), (5, 0)):
            writer.write_table(table.slice(at, size))
    for images_per_shard in (1, 2, 3, 10):
        config = SourceConfig(urls=urls(), images_per_shard=images_per_shard)
        place = find(str(tmp_path))
        rows = [row for one in tables.ranges(place, config, Account()) for row in tables.rows(place, one, config)]
        assert [(row.row, row.url, row.captions) for row in rows] == [
            (i, f"https://a.b/{i}.png", [f"t{i}"]) for i in range(5)
        ]


def test_binary_captions_of_a_parquet_table_are_decoded_as_text_files_are(tmp_path):
    texts = [b"caf\xe9", "boats".encode("utf-16"), "naïve".encode(), None]
    table = pa.table({"url": [b"https://a.b/1.png"] * 4, "text": pa.array(texts, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet")
    place = find(tmp_path)
    whole = tables.Range("x.parquet", 0, 4)
    rows = list(tables.rows(place, whole, SourceConfig(urls=urls())))
    assert [row.captions for row in rows] == [[], ["boats"], ["naïve"], []]
    assert {row.url for row in rows} == {"https://a.b/1.png"}
    assert rows[0].problem.startswith("x.parquet:0 is not UTF-8") and not any(row.problem for row in rows[1:])
    assert next(tables.rows(place, whole, SourceConfig(urls=urls(), encoding="cp1252"))).captions == ["café"]


def test_a_robots_txt_of_many_agents_and_rules_is_parsed_in_a_second():
    agents = "".join(f"useragent:{i:x}\n" for i in range(16_000))
    text = agents + "allow:/\n" * ((robots.MAX_ROBOTS_BYTES - len(agents)) // 8)  # 5 * 10^8 rules, one for each agent
    begin = time.process_time()
    assert robots.Rules("nucleus-flyte/0.1", text).allows("https://a.test/b")
    assert time.process_time() - begin < 5


def test_a_robots_txt_that_takes_long_to_match_forbids_what_is_left(monkeypatch):
    monkeypatch.setattr(robots, "MATCH_S", 1e-9)
    rules = robots.Rules("nucleus-flyte/0.1", "User-agent: *\nDisallow: /*z\n")
    assert rules.allows("https://a.test/b") and not rules.allows("https://a.test/b")


@pytest.mark.parametrize(
    ("text", "allowed", "delay_s"),
    [
        ("User-agent: other\nDisallow: /\n", True, 0),
        ("User-agent: other\nUser-agent: *\nDisallow: /\nCrawl-delay: 7\n", False, 7),
        ("User-agent: *\nDisallow: /\n\nuser agent Nucleus*\nAllow: /\n", True, 0),
        ("User-agent: nucleus\nDisallow: /\n\nUser-agent: nucleus-flyte\nAllow: /\n", True, 0),
        ("User-agent: us-flyte\nDisallow: /\n", True, 0),
        ("User-agent: flyte\nDisallow: /\n", True, 0),
        ("User-agent: nucleus # ours\nDisallow: /\n\nUser-agent: others\nAllow: /\n", False, 0),
        ("User-agent:\nDisallow: /\n", True, 0),
        ("user-agent nucleus-flyte: x\nDisallow: /\n", True, 0),
    ],
)
def test_the_group_that_names_the_agent_best_is_obeyed(text, allowed, delay_s):
    rules = robots.Rules("nucleus-flyte/0.1", text)
    assert (rules.allows("https://a.test/b"), rules.delay_s()) == (allowed, delay_s)


def test_rules_of_sites_leave_memory_when_there_are_many_and_are_asked_for_again(site, monkeypatch):
    monkeypatch.setattr(fetch, "ROBOTS_CHARS", 2 * fetch.ROBOTS_EXTRA + 200)
    for i in range(4):
        site.robots[f"h{i}.test"] = (200, "User-agent: *\nDisallow: /ok/9.png\n")
    wanted = [site.url(f"/ok/{i}.png", f"h{i % 4}.test") for i in range(8)]
    actual = all_fetched(wanted, concurrency=1)
    assert [one.rule for one in actual] == [""] * 8
    assert 4 < site.requests["/robots.txt"] <= 8


@pytest.mark.slow
def test_answers_over_a_bound_wait_on_disk(site, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "SPOOL_BYTES", 100)
    rolled = []
    real = fetch.tempfile.SpooledTemporaryFile

    class Spooled(real):
        def rollover(self):
            rolled.append(self._TemporaryFileArgs["dir"])
            super().rollover()

    monkeypatch.setattr(fetch.tempfile, "SpooledTemporaryFile", Spooled)
    path = table_of(tmp_path / "source" / "urls.parquet", [site.url(f"/ok/{i}.png") for i in range(3)])
    read = open_curated(curate(path.parent))
    assert [record.data for part in read.parts() for _, record in read.images(part)] == [png(i) for i in range(3)]
    assert len(rolled) == 3 and all((tmp_path / "home") in Path(where).parents for where in rolled)


def test_a_redirect_to_a_url_of_any_length_is_not_followed(site):
    result = fetched(site.url("/redirect?to=" + quote(site.url("/ok/1.png?" + "a" * network.MAX_URL_CHARS))))
    assert (
        result.rule == "url_invalid"
        and "longer than" in result.detail
        and not any(name.startswith("/ok") for name in site.requests)
    )
