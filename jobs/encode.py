"""Encodes images and captions once: shards + teacher -> encoded/."""

from cli import main
from stages import encode_splits

if __name__ == "__main__":
    main("encode", encode_splits, __doc__)
