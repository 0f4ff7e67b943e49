"""Learns router and codes under the MACs budget: encoded + teacher -> router/, routing.json."""

from cli import main
from stages import prune

if __name__ == "__main__":
    main("prune", prune, __doc__)
