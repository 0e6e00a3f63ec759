"""The embedded language model: llama.cpp in a child process."""
