"""The `publish` section of a recipe."""

from __future__ import annotations

from pydantic import model_validator

from model.config import Section
from model.storage import check_path, without_login


class PublishConfig(Section):
    """Further destinations of the pipeline, and settings of its card."""

    title: str = "Nucleus-Image reproduction"
    license: str = "apache-2.0"
    hub_repo_id: str | None = None  # pushed there if set
    hub_private: bool = True  # a repository made for it is private; an existing public one is refused
    hub_revision: str | None = None  # a branch, made if it does not exist; None: main
    s3_uri: str | None = None  # uploaded there if set
    s3_bucket_owner: str | None = None  # account id that must own that bucket

    @model_validator(mode="after")
    def _check(self) -> PublishConfig:
        if self.s3_uri is not None:
            if not self.s3_uri.startswith("s3://"):
                raise ValueError(f"s3_uri={without_login(self.s3_uri)!r} must start with s3://")
            check_path(self.s3_uri)
        return self
