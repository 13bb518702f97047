"""llama.cpp: llama-server: options, memory, log and metrics of the engine."""
