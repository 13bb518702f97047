"""The command line: one short module a verb. The only place that prints."""
