#!/usr/bin/env python3
"""Merge a sharded FSDP checkpoint into Hugging Face safetensors; `--help` lists the flags."""
import sys

if __name__ == "__main__":
    try:
        from merger.cli import main
        code = main()
    except KeyboardInterrupt:  # while the imports ran; later `main` tidies up and says so
        code = 130
    sys.exit(code)
