"""llama.cpp, served by llama-server."""
