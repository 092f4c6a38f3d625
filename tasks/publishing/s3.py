"""Publishes a sealed directory to S3 as a new version, then moves `latest.json` to it.

    PREFIX/versions/DIGEST/...            the files, then manifest.json: a version with a manifest is complete
    PREFIX/latest.json                    {"digest", "uri", "manifest_sha256"} of the version to read

A version is never changed, and nothing is deleted, so that readers of an older version are not affected. `latest.json`
is written last, and only if it has not changed since this publisher read it (If-Match, If-None-Match): one of two
concurrent publishers fails, and their files cannot mix. If a publisher is killed, the old version stays the latest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.logs import get_logger
from model.storage import s3_access
from tasks.manifest import MANIFEST, Manifest, public_manifest, verify

logger = get_logger(__name__)

MIB = 1 << 20
PART_BYTES = 64 * MIB
MAX_PARTS = 10_000  # S3's limit
VERSIONS, LATEST = "versions", "latest.json"
ABSENT = ("NoSuchKey", "404", "NotFound")
CONFLICT = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def upload(
    directory: str | Path,
    s3_uri: str,
    client: Any = None,
    part_bytes: int = PART_BYTES,
    bucket_owner: str | None = None,
) -> dict[str, Any]:
    """Uploads a sealed directory as a version below `s3_uri` and makes it the latest.

    Existing objects with the same bytes, by the store's own SHA-256, are skipped: after a failure, run it again.

    Args:
        directory: a sealed directory.
        s3_uri: s3://bucket/prefix.
        client: a boto3 S3 client; default: boto3's own configuration, or Flyte's (FLYTE_AWS_ENDPOINT, ...).
        part_bytes: larger files are uploaded in parts of this size (at least 5 MiB, S3's limit).
        bucket_owner: account id that must own the bucket.

    Returns:
        {"uri", "latest", "digest", "uploaded", "skipped", "bytes"} (numbers of objects; bytes of the uploaded ones).

    Raises:
        ValueError: not an S3 URI, no such bucket, no access, a version directory with other objects in it, an object that
            differs from its file after the upload, or another publisher that moved `latest.json` meanwhile.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _split(s3_uri)
    if part_bytes < 5 * MIB:
        raise ValueError(f"part_bytes={part_bytes} must be at least {5 * MIB} (5 MiB)")
    directory = Path(directory)
    manifest = verify(directory)
    place = _Place(client or _client(), bucket, prefix, {"ExpectedBucketOwner": bucket_owner} if bucket_owner else {})
    try:
        return _publish(place, directory, manifest, part_bytes)
    except ClientError as error:
        code = _code(error)
        if code in ("NoSuchBucket", "404"):
            raise ValueError(f"{s3_uri}: there is no bucket {bucket!r}") from error
        if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            owner = f", and that account {bucket_owner} owns the bucket" if bucket_owner else ""
            raise ValueError(
                f"{s3_uri}: access denied ({code}); check the credentials and the bucket's policy{owner}"
            ) from error
        raise
    except BotoCoreError as error:  # no credentials, no route to the endpoint
        raise ValueError(f"{s3_uri}: {error}") from error


def latest(s3_uri: str, client: Any = None) -> dict[str, str] | None:
    """The content of `latest.json` below `s3_uri`: {"digest", "uri", "manifest_sha256"}; None if nothing was published.

    Raises:
        ValueError: it is not a pointer of this project.
    """
    bucket, prefix = _split(s3_uri)
    content, _ = _Place(client or _client(), bucket, prefix, {}).read(LATEST)
    return None if content is None else _pointer(content, f"s3://{bucket}/{prefix}{LATEST}")


class _Place:
    """A prefix of a bucket; keys are relative to it."""

    def __init__(self, client: Any, bucket: str, prefix: str, owner: dict[str, str]) -> None:
        self.client, self.bucket, self.prefix, self.owner = client, bucket, prefix, owner

    def uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{name}"

    def read(self, name: str) -> tuple[bytes | None, str]:
        """(content, ETag) of a small object; (None, "") if it does not exist."""
        from botocore.exceptions import ClientError

        try:
            response = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name, **self.owner)
        except ClientError as error:
            if _code(error) in ABSENT:
                return None, ""
            raise
        return response["Body"].read(), response["ETag"]

    def head(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            return self.client.head_object(
                Bucket=self.bucket, Key=self.prefix + name, ChecksumMode="ENABLED", **self.owner
            )
        except ClientError as error:
            if _code(error) in ABSENT:
                return None
            raise

    def names(self, folder: str) -> Iterator[str]:
        """Names of all objects below a folder, relative to it."""
        root = f"{self.prefix}{folder}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root, **self.owner)
        for page in pages:
            for entry in page.get("Contents", []):
                yield entry["Key"][len(root) :]

    def write(self, name: str, content: bytes, condition: dict[str, str]) -> None:
        """Writes a small object if the condition (IfMatch, IfNoneMatch) holds.

        Raises:
            ValueError: it does not hold.
        """
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(
                Bucket=self.bucket,
                Key=self.prefix + name,
                Body=content,
                ContentType="application/json",
                ChecksumAlgorithm="SHA256",
                **condition,
                **self.owner,
            )
        except ClientError as error:
            if _code(error) in CONFLICT:
                raise ValueError(
                    f"{self.uri(name)} was changed by another publisher meanwhile; nothing of it was replaced. Run it again"
                ) from error
            raise


def _code(error: Any) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _split(s3_uri: str) -> tuple[str, str]:
    """(bucket, prefix that is empty or ends with a slash)."""
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    if not s3_uri.startswith("s3://") or not bucket or "@" in bucket:
        raise ValueError(f"{s3_uri!r} is not of the form s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def _client() -> Any:
    import boto3

    access = s3_access()
    return boto3.Session().client(  # boto3's default session would keep expired credentials
        "s3",
        endpoint_url=access.get("endpoint_url"),
        aws_access_key_id=access.get("key"),
        aws_secret_access_key=access.get("secret"),
    )


def _pointer(content: bytes, uri: str) -> dict[str, str]:
    try:
        fields = json.loads(content)
        return {name: str(fields[name]) for name in ("digest", "uri", "manifest_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} is not a pointer to a published version; choose an empty prefix") from error


def _publish(place: _Place, directory: Path, manifest: Manifest, part_bytes: int) -> dict[str, Any]:
    place.client.head_bucket(Bucket=place.bucket, **place.owner)
    before, etag = place.read(LATEST)
    if before is not None:
        _pointer(before, place.uri(LATEST))
    version = f"{VERSIONS}/{manifest.digest}"
    names = {**manifest.files, **manifest.logs}
    for name in place.names(version):
        if name not in names and name != MANIFEST:
            raise ValueError(f"{place.uri(version)}/{name} is not a file of this version; choose an empty prefix")

    report = {"uri": place.uri(version), "latest": place.uri(LATEST), "digest": manifest.digest}
    counts = {"uploaded": 0, "skipped": 0, "bytes": 0}
    for i, (name, digest) in enumerate(names.items(), 1):
        path = directory / name
        size = path.stat().st_size
        part = max(part_bytes, -(-size // MAX_PARTS))
        key = f"{version}/{name}"
        if _holds(place.head(key), path, digest, size, part):
            counts["skipped"] += 1
            continue
        _send(place, key, path, digest, size, part)
        counts["uploaded"] += 1
        counts["bytes"] += size
        logger.info(f"s3: {i}/{len(names) + 1} {place.uri(key)} ({size:,} bytes)")

    content = public_manifest(manifest).model_dump_json(indent=1).encode()
    there, there_etag = place.read(f"{version}/{MANIFEST}")
    if there is not None and hashlib.sha256(there).digest() == hashlib.sha256(content).digest():
        counts["skipped"] += 1
    else:
        place.write(f"{version}/{MANIFEST}", content, {"IfMatch": there_etag} if there else {"IfNoneMatch": "*"})
        counts["uploaded"] += 1
        counts["bytes"] += len(content)
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = {"digest": manifest.digest, "uri": report["uri"], "manifest_sha256": sha256}
    after = (json.dumps(pointer, indent=1) + "\n").encode()
    if before != after:
        place.write(LATEST, after, {"IfMatch": etag} if before is not None else {"IfNoneMatch": "*"})
    return report | counts


def _send(place: _Place, key: str, path: Path, digest: str, size: int, part: int) -> None:
    from boto3.s3.transfer import TransferConfig

    place.client.upload_file(
        str(path),
        place.bucket,
        place.prefix + key,
        # S3 refuses a part whose bytes do not match the checksum that boto3 sends.
        ExtraArgs={"ChecksumAlgorithm": "SHA256", **place.owner},
        Config=TransferConfig(multipart_threshold=part, multipart_chunksize=part),
    )
    head = place.head(key)
    if head is None or head["ContentLength"] != size:
        stored = "no object" if head is None else f"{head['ContentLength']} bytes"
        raise ValueError(f"{place.uri(key)} has {stored} after the upload, {path} has {size} bytes")
    # Some S3-compatible stores keep no checksum: boto3's own check of each part must suffice.
    if head.get("ChecksumSHA256") is not None and not _holds(head, path, digest, size, part):
        raise ValueError(
            f"{place.uri(key)} has the checksum {head['ChecksumSHA256']} after the upload, not that of {path}"
        )


def _holds(head: dict[str, Any] | None, path: Path, digest: str, size: int, part: int) -> bool:
    """Whether an object has the file's bytes, by the store's own checksum. Object metadata is not trusted: the writer
    of the object also wrote it."""
    if head is None or head["ContentLength"] != size or head.get("ChecksumSHA256") is None:
        return False
    whole = base64.b64encode(bytes.fromhex(digest)).decode()
    expected = _composite(path, part) if size >= part else whole  # boto3 uploads in parts from the threshold on
    return head["ChecksumSHA256"].split("-")[0] == expected  # S3 adds the number of parts; some stores do not


def _composite(path: Path, part: int) -> str:
    """S3's checksum of an object uploaded in parts, without their number: the digest of the parts' digests."""
    digests = []
    with open(path, "rb") as file:
        while left := min(part, path.stat().st_size - file.tell()):
            digest = hashlib.sha256()
            while left and (block := file.read(min(left, MIB))):
                digest.update(block)
                left -= len(block)
            digests.append(digest.digest())
    return base64.b64encode(hashlib.sha256(b"".join(digests)).digest()).decode()
