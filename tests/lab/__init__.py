"""The lab: a real systemd with podman, booted from a cached root tree, for tests and demos."""
