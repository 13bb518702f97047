"""vLLM: options, memory, log and metrics of the engine."""
