"""The command line, one module for each verb. No other package prints."""
