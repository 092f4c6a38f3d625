"""Uploads a sealed directory to S3, its manifest last: what has a manifest there is whole."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from model.storage import s3_access
from tasks.manifest import MANIFEST, Manifest, sha256_file, verify

MIB = 1 << 20
PART_BYTES = 64 * MIB
MAX_PARTS = 10_000  # S3's limit
MARK = "sha256"  # our object metadata: what the object holds, whatever its ETag


def upload(directory: str | Path, s3_uri: str, client: Any = None, part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """Uploads every file below `s3_uri`, checks each against its SHA-256, then uploads manifest.json.

    Objects that are there with the same digest are skipped, so running it again after a failure goes on where it
    stopped. The manifest of an older upload is removed before anything of it is replaced, so that a reader never
    finds a manifest over a mixture; the older upload's other files are removed too.

    Args:
        directory: a sealed directory.
        s3_uri: s3://bucket/prefix.
        client: a boto3 S3 client; default: boto3's own configuration, or Flyte's (FLYTE_AWS_ENDPOINT, ...).
        part_bytes: files above it go in parts of that size (at least 5 MiB, S3's limit).

    Returns:
        {"uri", "digest", "uploaded", "skipped", "removed", "bytes"} (counts of objects; bytes of the uploaded).

    Raises:
        ValueError: not an S3 URI, no such bucket, no access, a place that holds somebody else's objects, or an
            object that differs from its file after the upload.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _split(s3_uri)
    if part_bytes < 5 * MIB:
        raise ValueError(f"part_bytes={part_bytes} must be at least {5 * MIB} (5 MiB)")
    directory = Path(directory)
    manifest = verify(directory)
    try:
        return _upload(client or _client(), bucket, prefix, directory, manifest, part_bytes)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("NoSuchBucket", "404"):
            raise ValueError(f"{s3_uri}: there is no bucket {bucket!r}") from error
        if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise ValueError(
                f"{s3_uri}: access denied ({code}); check the credentials and the bucket's policy"
            ) from error
        raise
    except BotoCoreError as error:  # no credentials, no route to the endpoint
        raise ValueError(f"{s3_uri}: {error}") from error


def _split(s3_uri: str) -> tuple[str, str]:
    """(bucket, prefix that is empty or ends with a slash)."""
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    if not s3_uri.startswith("s3://") or not bucket:
        raise ValueError(f"{s3_uri!r} is not of the form s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def _client() -> Any:
    import boto3

    access = s3_access()
    return boto3.client(
        "s3",
        endpoint_url=access.get("endpoint_url"),
        aws_access_key_id=access.get("key"),
        aws_secret_access_key=access.get("secret"),
    )


def _upload(
    client: Any, bucket: str, prefix: str, directory: Path, manifest: Manifest, part_bytes: int
) -> dict[str, Any]:
    from boto3.s3.transfer import TransferConfig

    client.head_bucket(Bucket=bucket)
    older = _older_manifest(client, bucket, prefix)
    there = _list(client, bucket, prefix)
    wanted = {prefix + name for name in (*manifest.files, MANIFEST)}
    strays = sorted(there - wanted)
    ours = {prefix + name for name in older}
    for key in strays:
        if key not in ours and _mark(client.head_object(Bucket=bucket, Key=key)) is None:
            raise ValueError(f"s3://{bucket}/{key} is not of an upload like this one; choose an empty prefix")

    fresh = sha256_file(directory / MANIFEST)
    if prefix + MANIFEST in there and _mark(client.head_object(Bucket=bucket, Key=prefix + MANIFEST)) != fresh:
        client.delete_object(Bucket=bucket, Key=prefix + MANIFEST)
    for key in strays:
        client.delete_object(Bucket=bucket, Key=key)

    report = {"uri": f"s3://{bucket}/{prefix}", "digest": manifest.digest, "uploaded": 0, "skipped": 0, "removed": len(strays), "bytes": 0}  # fmt: skip
    files = [*manifest.files.items(), (MANIFEST, fresh)]
    for i, (name, digest) in enumerate(files, 1):
        path = directory / name
        size = path.stat().st_size
        if _same(client, bucket, prefix + name, digest, size):
            report["skipped"] += 1
            continue
        part = max(part_bytes, -(-size // MAX_PARTS))
        client.upload_file(
            str(path),
            bucket,
            prefix + name,
            # S3 refuses a part whose bytes do not have the checksum that boto3 sends with it.
            ExtraArgs={"Metadata": {MARK: digest}, "ChecksumAlgorithm": "SHA256"},
            Config=TransferConfig(multipart_threshold=part, multipart_chunksize=part),
        )
        _check(client, bucket, prefix + name, path, digest, size, part)
        report["uploaded"] += 1
        report["bytes"] += size
        print(f"s3: {i}/{len(files)} s3://{bucket}/{prefix}{name} ({size:,} bytes)", flush=True)
    return report


def _list(client: Any, bucket: str, prefix: str) -> set[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {entry["Key"] for page in pages for entry in page.get("Contents", [])}


def _older_manifest(client: Any, bucket: str, prefix: str) -> set[str]:
    """The names that a manifest there lists; empty without one."""
    from botocore.exceptions import ClientError

    try:
        body = client.get_object(Bucket=bucket, Key=prefix + MANIFEST)["Body"].read()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
            return set()
        raise
    try:
        return set(json.loads(body)["files"])
    except (ValueError, KeyError, TypeError):
        return set()


def _mark(head: dict[str, Any]) -> str | None:
    return head.get("Metadata", {}).get(MARK)


def _same(client: Any, bucket: str, key: str, digest: str, size: int) -> bool:
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404", "NotFound"):
            return False
        raise
    return _mark(head) == digest and head["ContentLength"] == size


def _check(client: Any, bucket: str, key: str, path: Path, digest: str, size: int, part: int) -> None:
    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    if head["ContentLength"] != size:
        raise ValueError(f"s3://{bucket}/{key} has {head['ContentLength']} bytes after the upload, {path} has {size}")
    stored = head.get("ChecksumSHA256")
    if stored is None:  # a store that keeps none, such as some S3-compatible ones: boto3's own checks must do
        return
    whole = base64.b64encode(bytes.fromhex(digest)).decode()
    expected = _composite(path, part) if size >= part else whole  # boto3 uploads in parts from the threshold on
    if stored.split("-")[0] != expected:  # S3 adds the number of parts, not every store does
        raise ValueError(f"s3://{bucket}/{key} has the checksum {stored} after the upload, {path} has {expected}")


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
