"""Checks, before a run starts, what it needs of a cluster.

    python -m tasks.preflight --recipe nucleus_17b --shape 8x8
    python -m tasks.preflight --recipe nucleus_17b --shape 8x8 --json

Read-only, but for one object under BUCKET/.preflight that it writes and removes. Secrets are never printed.
"""
