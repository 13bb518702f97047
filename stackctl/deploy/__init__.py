"""Changes what runs: the only code that installs units and starts or stops services."""
