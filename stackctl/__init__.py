"""Plans, launches and checks local inference stacks under Podman and systemd."""

__version__ = "0.1.0"
