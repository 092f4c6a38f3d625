"""Checks, before a run starts, the cluster's requirements.

    python -m tasks.preflight --recipe nucleus_17b --shape 8x8
    python -m tasks.preflight --recipe nucleus_17b --shape 8x8 --json

Read-only, except one object under BUCKET/.preflight that it writes and removes. Secrets are never printed.
"""
