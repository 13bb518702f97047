"""The only code that touches the machine: files, processes, systemd, Podman, HTTP and locks."""
