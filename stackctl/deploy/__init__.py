"""Deployment of stacks: the only code that installs units and starts or stops services."""
