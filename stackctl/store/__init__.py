"""Models on disk: download, verify, pin, share with other tools, export to other machines."""
