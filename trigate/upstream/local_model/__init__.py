"""The embedded language model: llama.cpp in a child process. `process` owns the child, which runs `child` by path."""
