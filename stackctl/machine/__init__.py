"""Access to the machine: files, processes, systemd, Podman, HTTP and locks."""
