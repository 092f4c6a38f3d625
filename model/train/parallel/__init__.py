"""Training on several ranks: FSDP2 and expert parallel, their optimisers, and checks that replicas agree."""
