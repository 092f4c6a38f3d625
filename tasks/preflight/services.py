"""Checks of the recipe, the object store, the registry and Flyte's own endpoint."""

from __future__ import annotations

import functools
import os
import re
import uuid
from typing import Any
from urllib.parse import urlsplit

from tasks.preflight import registry_client
from tasks.preflight.checks import Failed, Skipped, Target, check
from tasks.preflight.cluster import flyte_config, section

STOCK_LIMITS = {"cpu": "2", "memory": "1Gi", "gpu": "1"}  # flyteadmin's, where its configuration sets none
PART = 5 * 2**20  # the smallest part of a multipart upload


@check("recipe and shape", "Register the recipe's own shape, or override train.nnodes and train.nproc_per_node.")
def recipe_and_shape(target: Target) -> str:
    train = target.recipe.train
    if (train.nnodes, train.nproc_per_node) != (target.nnodes, target.nproc):
        raise Failed(
            f"recipe {target.recipe.name} trains on {train.nnodes}x{train.nproc_per_node}, not on "
            f"{target.nnodes}x{target.nproc}"
        )
    return f"{target.recipe.name} on {target.nnodes}x{target.nproc} of {target.profile.name}"


@check("recipe's source", "Set source.path of the recipe, or --source, to your own data.")
def recipe_source(target: Target) -> str:
    path = target.recipe.source.path
    if path and "YOUR-BUCKET" in path:
        raise Failed(f"source.path={path} is the example")
    return path or "made by the recipe"


@functools.cache
def _s3(endpoint: str | None) -> Any:
    """One client per endpoint, since making one takes longer than a request."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


class _Probe:
    """The object that the checks of a place in the object store write, under its folder .preflight."""

    def __init__(self, place: str):
        if not place:
            raise Skipped("no bucket is configured (nucleus.bucket)")
        parts = urlsplit(place)
        if parts.scheme != "s3":
            raise Skipped(f"{place} is not in S3")
        self.s3 = _s3(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
        self.bucket = parts.netloc
        self.key = f"{parts.path.strip('/')}/.preflight/{uuid.uuid4().hex}".lstrip("/")


@check("bucket", "Create the bucket, and let this identity list it.")
def bucket(target: Target) -> str:
    probe = _Probe(target.bucket)
    probe.s3.head_bucket(Bucket=probe.bucket)
    return target.bucket


@check("bucket write, read, delete", "Allow s3:PutObject, s3:GetObject and s3:DeleteObject under the prefix.")
def bucket_object(target: Target) -> str:
    return _round_trip(target.bucket)


@check(
    "store", "Set nucleus.store to a bucket that pods share, and allow s3:PutObject, s3:GetObject and s3:DeleteObject."
)
def store(target: Target) -> str:
    if not urlsplit(target.store).scheme:
        raise Failed(f"{target.store} is a directory: pods cannot see each other's parts")
    return f"{target.store}: {_round_trip(target.store)}"


def _round_trip(place: str) -> str:
    probe, body = _Probe(place), os.urandom(64)
    probe.s3.put_object(Bucket=probe.bucket, Key=probe.key, Body=body)
    try:
        if probe.s3.get_object(Bucket=probe.bucket, Key=probe.key)["Body"].read() != body:
            raise Failed("what was read is not what was written")
    finally:
        probe.s3.delete_object(Bucket=probe.bucket, Key=probe.key)
    return "same bytes, removed"


@check("bucket multipart", "Allow s3:PutObject and s3:AbortMultipartUpload; checkpoints are uploaded in parts.")
def bucket_multipart(target: Target) -> str:
    probe = _Probe(target.bucket)
    at = {"Bucket": probe.bucket, "Key": probe.key}
    upload = probe.s3.create_multipart_upload(**at)["UploadId"]
    try:
        part = probe.s3.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"\0" * PART)
    finally:
        probe.s3.abort_multipart_upload(**at, UploadId=upload)
    return f"part {part['ETag']}, aborted"


@check("bucket conditional write", "Use a store that honours If-None-Match (S3 does): publishers rely on it.")
def bucket_conditional(target: Target) -> str:
    from botocore.exceptions import ClientError

    probe = _Probe(target.bucket)
    at = {"Bucket": probe.bucket, "Key": probe.key}
    probe.s3.put_object(**at, Body=b"1", IfNoneMatch="*")
    try:
        probe.s3.put_object(**at, Body=b"2", IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
            raise
        return "a second writer is refused"
    finally:
        probe.s3.delete_object(**at)
    raise Failed("a second write with If-None-Match replaced the first")


@check("image digests", "make images REGISTRY=... pushes all roles and writes containers/images.lock.json.")
def image_digests(target: Target) -> str:
    if not target.images:
        raise Failed("there is no lock of images")
    for role, image in target.images.items():
        if not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image):
            raise Failed(f"{role}: {image} names no digest")
    return f"{len(target.images)} roles by digest"


@check("images can be pulled", "Push the images, and log in to the registry (docker login) if it is private.")
def images_pulled(target: Target) -> str:
    if not target.images:
        raise Skipped("there is no lock of images")
    locked = 0
    for role, image in target.images.items():
        name, digest = image.split("@")
        registry, repository = name.split("/", 1)
        status = registry_client.manifest_status(registry, repository, digest)
        if status in (401, 403):
            locked += 1
        elif status != 200:
            raise Failed(f"{role}: {registry} answers {status} for {repository}@{digest[:19]}")
    if locked:
        raise Skipped(
            f"the registry refuses {locked} of {len(target.images)} to the login of this machine (docker login): not looked up"
        )
    return f"{len(target.images)} manifests are there"


def _admin(target: Target):
    import grpc
    from flyteidl.service import admin_pb2_grpc

    address = target.endpoint.removeprefix("dns:///")
    if not address:
        raise Skipped("no endpoint is configured (admin.endpoint)")
    channel = grpc.insecure_channel(address) if target.insecure else grpc.secure_channel(
        address, grpc.ssl_channel_credentials()
    )  # fmt: skip
    return admin_pb2_grpc.AdminServiceStub(channel)


def _call(method, request, absent: Any = None):
    """The answer of flyteadmin; `absent`, if given, where it says that there is no such object."""
    import grpc

    try:
        return method(request, timeout=15)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND and absent is not None:
            return absent
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise Skipped(
                "the endpoint asks for a login: pyflyte -c config/flyte.yaml does it at registration"
            ) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise Skipped("the endpoint does not say") from None
        raise Failed(f"{error.code().name}: {error.details()}") from None


@check("flyte endpoint", "Name the gRPC endpoint in config/flyte.yaml (admin.endpoint, insecure).")
def flyte_endpoint(target: Target) -> str:
    from flyteidl.admin import version_pb2

    answer = _call(_admin(target).GetVersion, version_pb2.GetVersionRequest())
    version = answer.control_plane_version.Version
    if not re.match(r"v?1\.(1[6-9]|[2-9]\d)\.", version):
        raise Failed(f"Flyte {version}: suspended training jobs work from 1.16.6")
    return f"Flyte {version}"


@check("flyte project and domain", "flytectl create project --id PROJECT; domains are in flyteadmin's configuration.")
def flyte_project(target: Target) -> str:
    from flyteidl.admin import project_pb2

    answer = _call(_admin(target).ListProjects, project_pb2.ProjectListRequest(limit=100))
    projects = {project.id: {domain.id for domain in project.domains} for project in answer.projects}
    if target.project not in projects:
        raise Failed(f"there is no project {target.project!r}; there are {', '.join(sorted(projects))}")
    if target.domain not in projects[target.project]:
        raise Failed(f"project {target.project} has no domain {target.domain!r}")
    return f"{target.project}/{target.domain}"


@check(
    "flyte task limits",
    "Raise task_resources.limits (k8s/helm), or this project's by flytectl update task-resource-attribute.",
)
def task_limits(target: Target) -> str:
    """The project's own limits, or those of Flyte's configuration where the project has none."""
    from flyteidl.admin import matchable_resource_pb2, project_domain_attributes_pb2
    from kubernetes.utils import parse_quantity

    request = project_domain_attributes_pb2.ProjectDomainAttributesGetRequest(
        project=target.project, domain=target.domain, resource_type=matchable_resource_pb2.TASK_RESOURCE
    )
    none = project_domain_attributes_pb2.ProjectDomainAttributesGetResponse()
    answer = _call(_admin(target).GetProjectDomainAttributes, request, absent=none)
    own = answer.attributes.matching_attributes.task_resource_attributes.limits
    configured = STOCK_LIMITS | section(flyte_config(target), "task_resources", "limits")
    share = target.profile.train
    needed = {
        "cpu": str(share.cpu * target.nproc),
        "memory": f"{share.memory_gib * target.nproc}Gi",
        "gpu": str(target.nproc if target.gpus else 0),
    }
    for name, amount in needed.items():
        limit, of = getattr(own, name), f"project {target.project}"
        if not limit:
            limit, of = str(configured[name]), "Flyte's configuration"
        if parse_quantity(limit) < parse_quantity(amount):
            raise Failed(f"{name} {limit} ({of}), and a training pod asks for {amount}")
    return ", ".join(f"{name} {amount}" for name, amount in needed.items())
