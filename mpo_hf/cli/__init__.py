"""The command line: `mpo-hf fit`, `generate`, `chat`, `inspect` and `push`."""
